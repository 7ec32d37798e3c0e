"""ResNets of DynConv blocks (arXiv 1912.03203, sec. 4): classification of CIFAR and ImageNet.

    logits = fc(pool(layers(stem(x))))        x: (B, 3, H, W)   logits: (B, classes)

Depth 8, 14, 20, 26, 32: three layers of 16, 32, 64 channels, for 32 x 32 pixels. The published pool
averages only the top-left 8 x 8 positions of the last feature map: images of 33 to 60 pixels lose their right
and bottom, and other sizes than 29 to 60 are refused.
Depth 18, 34, 50, 101: four layers, for 224 x 224 pixels, pooled over the whole feature map.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.dynconv import SparseBasicBlock, SparseBottleneck
from edgedyn.layers.dynconv.residual import BasicBlock, Bottleneck

_CIFAR = {8: 1, 14: 2, 20: 3, 26: 4, 32: 5}  # depth -> blocks per layer
_IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_POOL = 8


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 pixels.

    Args:
        depth: 8, 14, 20, 26 or 32.
        num_classes: number of logits.
        sparse: whether blocks are gated; the same network without gates otherwise.

    Raises:
        ModelError: for another depth.
    """

    def __init__(self, depth: int = 32, *, num_classes: int = 10, sparse: bool = True) -> None:
        super().__init__()
        _check_depth(depth, _CIFAR)
        make = SparseBasicBlock if sparse else BasicBlock
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _layer(make, 16, 16, _CIFAR[depth])
        self.layer2 = _layer(make, 16, 32, _CIFAR[depth], 2)
        self.layer3 = _layer(make, 32, 64, _CIFAR[depth], 2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify (B, 3, H, W), H and W of 29 to 60.

        Raises:
            ModelError: for a size whose last feature map does not hold exactly one 8 x 8 window.
        """
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        if any(size // _POOL != 1 for size in y.shape[2:]):
            raise ModelError(
                f"the CIFAR ResNet got x {tuple(x.shape)}; expected height and width of 29 to 60, so that "
                "its 8 x 8 pool fits exactly once. Resize the image to 32 x 32, or take depth 18 or more."
            )
        logits: Tensor = self.fc(F.avg_pool2d(y, _POOL).flatten(1))
        return logits


class ImageNetResNet(nn.Module):
    """ResNet for 224 x 224 pixels.

    Args:
        depth: 18, 34 (BasicBlock), 50 or 101 (Bottleneck).
        num_classes: number of logits.
        width_mult: factor on the channels of every layer.
        sparse: whether blocks are gated; the same network without gates otherwise.
        groups: of the 3x3 convolutions of a Bottleneck.
        width_per_group: a Bottleneck's width at 64 planes, divided by groups.
        replace_stride_with_dilation: for layers 2, 3 and 4, of Bottlenecks: whether they dilate, not stride.

    Raises:
        ModelError: for another depth, or options that a BasicBlock does not have.
    """

    def __init__(
        self,
        depth: int = 18,
        *,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        sparse: bool = True,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
    ) -> None:
        super().__init__()
        _check_depth(depth, _IMAGENET)
        basic = depth < 50
        dilates = tuple(replace_stride_with_dilation)
        if len(dilates) != 3 or (basic and (groups, width_per_group, any(dilates)) != (1, 64, False)):
            raise ModelError(
                f"ResNet-{depth} got groups={groups}, width_per_group={width_per_group}, "
                f"replace_stride_with_dilation={dilates}; expected three booleans, and for depth 18 and 34, "
                "of BasicBlocks, groups 1, width 64 and no dilation. Take depth 50 or 101."
            )
        make: Any = SparseBasicBlock if sparse else BasicBlock
        if not basic:
            bottleneck = SparseBottleneck if sparse else Bottleneck
            make = functools.partial(bottleneck, groups=groups, base_width=width_per_group)
        expansion = 1 if basic else 4
        widths = [int(64 * 2**k * width_mult) for k in range(4)]
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inplanes, dilation = widths[0], 1
        for k, planes in enumerate(widths):
            stride, before = (2 if k else 1), dilation
            if k and dilates[k - 1]:
                stride, dilation = 1, 2 * dilation
            blocks = _IMAGENET[depth][k]
            layer = _layer(make, inplanes, planes, blocks, stride, expansion, (before, dilation))
            setattr(self, f"layer{k + 1}", layer)
            inplanes = planes * expansion
        self.fc = nn.Linear(inplanes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify (B, 3, H, W) of any H and W."""
        y = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for k in range(1, 5):
            y = self.get_submodule(f"layer{k}")(y)
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def _check_depth(depth: int, known: Mapping[int, Any]) -> None:
    if depth not in known:
        raise ModelError(
            f"a DynConv ResNet got depth={depth}; expected one of {sorted(known)}, as published."
        )


def _layer(
    make: Any,
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int = 1,
    expansion: int = 1,
    dilations: tuple[int, int] = (1, 1),
) -> nn.Sequential:
    """Chain blocks; the first has the stride, the shortcut, and the previous layer's dilation."""
    options: list[dict[str, int]] = [{}, {}]
    if dilations != (1, 1):
        options = [{"dilation": d} for d in dilations]
    outplanes = planes * expansion
    downsample = stride != 1 or inplanes != outplanes
    first = make(inplanes, planes, stride, downsample=downsample, **options[0])
    return nn.Sequential(first, *[make(outplanes, planes, **options[1]) for _ in range(blocks - 1)])


def dynconv_resnet(depth: int = 32, **options: Any) -> nn.Module:
    """Make the ResNet of a depth; options and errors as those of ``CifarResNet`` and ``ImageNetResNet``."""
    _check_depth(depth, _CIFAR | _IMAGENET)
    network: nn.Module = (CifarResNet if depth in _CIFAR else ImageNetResNet)(depth, **options)
    return network


def _from_authors(depth: int, arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Make the network of the authors' function ``resnet<depth>``, whose blocks are dense by default."""
    options = {key: value for key, value in arguments.items() if key not in ("name", "cls")}
    options.setdefault("sparse", any(".masker." in key for key in state_dict))
    refused = {
        "pretrained": (False, "weights come from the state_dict"),
        "norm_layer": (None, "BatchNorm is folded, others are not"),
    }
    for name, (expected, reason) in refused.items():
        if options.pop(name, expected) != expected:
            raise ModelError(f"resnet{depth} got {name}={arguments[name]!r}; {reason}. Leave it out.")
    if depth in _IMAGENET:
        for name in ("progress", "zero_init_residual"):  # they concern loading and initialisation
            options.pop(name, None)
        if options.get("replace_stride_with_dilation", ()) is None:
            options.pop("replace_stride_with_dilation")
    return dynconv_resnet(depth, **options)


NETWORK = dynconv_resnet
AUTHORS = {f"resnet{depth}": functools.partial(_from_authors, depth) for depth in (*_CIFAR, *_IMAGENET)}
