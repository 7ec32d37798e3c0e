"""DDF-ResNet: ResNet bottlenecks whose 3x3 convolution is a decoupled dynamic filter (arXiv 2104.14107).

    block   y = relu(BN(1x1(relu(BN(DDF(relu(BN(1x1(x)))))))) + shortcut(x))
    net     7x7 / 2, max pool / 2, four layers of blocks with strides 1, 2, 2, 2, global average, linear

x: (B, 3, H, W), H and W multiples of 32   logits: (B, classes)

Names and keys are those of the published checkpoints, which build on the blocks of timm 0.4.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddf import DDFPack

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_EXPANSION = 4
_PARTS = ("layer1", "layer2", "layer3", "layer4", "fc")
# of timm's ResNet; they change training only
_TRAINING_OPTIONS = ("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last_bn")


class DDFBottleneck(nn.Module):
    """Residual block: 1x1, DDFPack, 1x1, each with BatchNorm.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the channels of the output.
        stride: of the DDFPack and of the shortcut.
        combine: ``mul`` or ``add``, the DDFPack's.
        dilation: the DDFPack's.
        with_downsample: put a 1x1 convolution with BatchNorm into the shortcut.
        base_width: DDFPack channels for 64 planes and cardinality 1.
        cardinality: factor on the DDFPack's channels.
        se_ratio: the DDFPack's.
        gen_kernel_size: the DDFPack's.

    Raises:
        ModelError: where a plain shortcut does not fit, or the DDFPack's arguments do not.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        combine: str = "mul",
        dilation: int = 1,
        with_downsample: bool = False,
        base_width: int = 64,
        cardinality: int = 1,
        se_ratio: float = 0.2,
        gen_kernel_size: int = 1,
    ) -> None:
        super().__init__()
        width, outplanes = math.floor(planes * base_width / 64) * cardinality, planes * _EXPANSION
        if not with_downsample and (stride != 1 or inplanes != outplanes):
            raise ModelError(
                f"DDFBottleneck got {inplanes} channels in, {outplanes} out at stride {stride} and no "
                "convolution in its shortcut; expected equal channels and stride 1. Set with_downsample."
            )
        self.conv1, self.bn1 = nn.Conv2d(inplanes, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = DDFPack(
            width,
            stride=stride,
            dilation=dilation,
            se_ratio=se_ratio,
            kernel_combine=combine,
            gen_kernel_size=gen_kernel_size,
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outplanes, 1, bias=False), nn.BatchNorm2d(outplanes)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
            )
            if with_downsample
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4 * planes, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class DDFResNet(nn.Module):
    """The classifier; parameters at depth 50 and 101: 16,843,748 and 28,146,912.

    Args:
        depth: 50, 101 or 152.
        combine: ``mul`` or ``add``.
        num_classes: number of logits.
        in_chans: image channels.
        base_width: DDFPack channels for 64 planes.
        cardinality: factor on the DDFPacks' channels.
        output_stride: 32, 16 or 8; below 32 the later layers dilate instead of striding.
        se_ratio: the DDFPacks'.
        gen_kernel_size: the DDFPacks'.
        up_to: ``fc``, or the layer after which the network ends and whose features it returns.

    Raises:
        ModelError: for an unknown depth, output stride or layer.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        combine: str = "mul",
        num_classes: int = 1000,
        in_chans: int = 3,
        base_width: int = 64,
        cardinality: int = 1,
        output_stride: int = 32,
        se_ratio: float = 0.2,
        gen_kernel_size: int = 1,
        up_to: str = "fc",
    ) -> None:
        super().__init__()
        if depth not in BLOCKS or output_stride not in (8, 16, 32) or up_to not in _PARTS:
            raise ModelError(
                f"DDFResNet got depth={depth}, output_stride={output_stride}, up_to={up_to!r}; expected one "
                f"of {sorted(BLOCKS)}, one of [8, 16, 32] and one of {list(_PARTS)}."
            )
        options = {
            "combine": combine,
            "base_width": base_width,
            "cardinality": cardinality,
            "se_ratio": se_ratio,
            "gen_kernel_size": gen_kernel_size,
        }
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = _PARTS[: _PARTS.index(up_to) + 1]
        inplanes, dilation, reached = 64, 1, 4
        for k, (name, blocks) in enumerate(zip(self.layers, BLOCKS[depth], strict=False)):
            first_dilation, stride = dilation, 1 if k == 0 else 2
            if reached >= output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            setattr(
                self,
                name,
                _make_layer(inplanes, 64 * 2**k, blocks, stride, first_dilation, dilation, options),
            )
            inplanes = 64 * 2**k * _EXPANSION
        if up_to == "fc":
            self.fc = nn.Linear(inplanes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W), or the features of ``up_to``."""
        y: Tensor = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for name in self.layers:
            y = self.fc(y.mean((2, 3), keepdim=True).flatten(1)) if name == "fc" else getattr(self, name)(y)
        return y


def _make_layer(
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int,
    first_dilation: int,
    dilation: int,
    options: Mapping[str, Any],
) -> nn.Sequential:
    """Chain the blocks of one layer; the first has the layer's stride and the previous layer's dilation."""
    expands = stride != 1 or inplanes != planes * _EXPANSION
    first = DDFBottleneck(
        inplanes, planes, stride=stride, dilation=first_dilation, with_downsample=expands, **options
    )
    rest = (
        DDFBottleneck(planes * _EXPANSION, planes, dilation=dilation, **options) for _ in range(blocks - 1)
    )
    return nn.Sequential(first, *rest)


def _build_network(
    depth: int, combine: str
) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], DDFResNet]:
    """Return a function that makes the published network of that depth and combination from its arguments."""

    def build(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> DDFResNet:
        known = {k: v for k, v in arguments.items() if k not in ("name", *_TRAINING_OPTIONS)}
        known |= known.pop("block_args", {})
        return DDFResNet(depth, combine=combine, **known)

    return build


def _build_block(class_combine: str) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], DDFBottleneck]:
    """Return a function that makes the published block of that combination from its arguments.

    Its ``dilation`` is timm's, of the convolution that the DDFPack replaces; ``first_dilation`` is the
    DDFPack's, and without it the published block fails when it is called.
    """

    def build(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> DDFBottleneck:
        known = {k: v for k, v in arguments.items() if k not in ("dilation", "drop_path", "drop_block")}
        if known.pop("reduce_first", 1) != 1 or known.get("first_dilation") is None:
            raise ModelError(
                f"DDF bottleneck got reduce_first={arguments.get('reduce_first', 1)}, first_dilation="
                f"{arguments.get('first_dilation')}; expected reduce_first=1 and a number for "
                "first_dilation, without which the published block does not run. Pass first_dilation=1."
            )
        return DDFBottleneck(
            dilation=known.pop("first_dilation"), combine=known.pop("combine", class_combine), **known
        )

    return build


NETWORK = DDFResNet
AUTHORS = {
    f"ddf_{combine}_resnet{depth}": _build_network(depth, combine)
    for combine in ("mul", "add")
    for depth in BLOCKS
} | {f"DDF{combine.capitalize()}Bottleneck": _build_block(combine) for combine in ("mul", "add")}
