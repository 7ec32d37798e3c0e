"""DynConv (arXiv 1912.03203, CVPR 2020): residual blocks that evaluate their branch at active positions only.

    mask[p] = 1 where head(x)[p] >= 0, else 0
    y = ReLU(identity + mask * F(x))         BasicBlock, Bottleneck; the shortcut stays dense
    y = x + mask * F(x)                      InvertedResidual

x: (B, C, H, W)   mask: (B, 1, h, w), one decision per position of the block's output

F's 3x3 convolution reads neighbours, so the convolution in front of it is needed where the dilated mask is
set: as far from a position of the mask as the 3x3 convolution reaches (at stride s, after s - 1 zeros are
inserted between positions). Elsewhere it changes nothing.

The reference modules follow the published code, with its state_dict keys, and compute F everywhere. The
canonical modules fold BatchNorm into F's convolutions and call ``edgedyn::masked_conv2d`` for each of them:
the first on the dilated mask, the others on the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers import Layer
from edgedyn.layers._adopt import adopt, require, require_outputs
from edgedyn.layers.dynconv.masks import (
    AuthorsMaskUnit,
    CanonicalMaskUnit,
    MaskUnit,
    PointMaskHead,
    PooledMaskHead,
    Selection,
)
from edgedyn.layers.dynconv.residual import BasicBlock, Bottleneck, InvertedResidual
from edgedyn.ops.masked_conv2d import masked_conv2d


def _either_call(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """Let a block's forward also take and return the authors' pair (x, meta), meta unchanged."""

    @functools.wraps(forward)
    def call(self: nn.Module, x: Any) -> Any:
        return (forward(self, x[0]), *x[1:]) if isinstance(x, tuple) else forward(self, x)

    return call


class SparseBasicBlock(BasicBlock):
    """DynConv's BasicBlock; arguments as those of the dense one."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *, downsample: bool = False) -> None:
        super().__init__(inplanes, planes, stride, downsample=downsample)
        self.masker = MaskUnit(PooledMaskHead(inplanes, stride))

    @_either_call
    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(identity + mask * F(x)); (B, inplanes, H, W) to (B, planes, h, w)."""
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + self.masker(x).mask * self.branch(x))


class SparseBottleneck(Bottleneck):
    """DynConv's Bottleneck; arguments as those of the dense one."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, **options: Any) -> None:
        super().__init__(inplanes, planes, stride, **options)
        self.masker = MaskUnit(PooledMaskHead(inplanes, stride), dilate_stride=stride)

    @_either_call
    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(identity + mask * F(x)); (B, inplanes, H, W) to (B, 4 * planes, h, w)."""
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + self.masker(x).mask * self.branch(x))


class SparseInvertedResidual(InvertedResidual):
    """DynConv's InvertedResidual, of stride 1 and as many channels out as in.

    Raises:
        ModelError: for another stride or number of channels, or an expand_ratio of 1.
    """

    def __init__(self, inp: int, oup: int, stride: int = 1, *, expand_ratio: float = 6) -> None:
        if stride != 1 or inp != oup or expand_ratio == 1:
            raise ModelError(
                f"a sparse InvertedResidual got {inp} channels in, {oup} out, stride={stride}, "
                f"expand_ratio={expand_ratio}; expected stride 1, as many channels out as in and an "
                "expansion other than 1: otherwise inactive positions have no value. Use the dense block."
            )
        super().__init__(inp, oup, expand_ratio=expand_ratio)
        self.masker = MaskUnit(PointMaskHead(inp))

    @_either_call
    def forward(self, x: Tensor) -> Tensor:
        """Return x + mask * F(x); (B, inp, H, W) both."""
        y: Tensor = x + self.masker(x).mask * self.conv(x)
        return y


class MaskedConv2d(nn.Module):
    """A convolution with its BatchNorm folded in and its activation, evaluated where a mask is set."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = conv.weight * factor.view(-1, 1, 1, 1)
        self.weight = nn.Parameter(weight.detach())
        self.bias = nn.Parameter((norm.bias - norm.running_mean * factor).detach())
        self.stride, self.padding = int(conv.stride[0]), int(conv.padding[0])
        self.dilation, self.groups = int(conv.dilation[0]), conv.groups

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Convolve (B, I, H, W) where the mask (B, 1, h, w) is set: (B, O, h, w)."""
        settings = self.stride, self.padding, self.dilation, self.groups, self.activation
        return masked_conv2d(x, self.weight, self.bias, mask, *settings)


class CanonicalBasicBlock(nn.Module):
    """BasicBlock on ``edgedyn::masked_conv2d``; the first convolution has the stride."""

    def __init__(self, block: SparseBasicBlock) -> None:
        super().__init__()
        self.masker, self.downsample = CanonicalMaskUnit(block.masker), block.downsample
        self.conv1 = MaskedConv2d(block.conv1, block.bn1, "relu")
        self.conv2 = MaskedConv2d(block.conv2, block.bn2)

    @_either_call
    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(identity + mask * F(x)); (B, inplanes, H, W) to (B, planes, h, w)."""
        _, mask, dilated = self.masker(x)
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + self.conv2(self.conv1(x, dilated), mask))


class CanonicalBottleneck(nn.Module):
    """Bottleneck on ``edgedyn::masked_conv2d``; the 3x3 convolution has the stride and the dilation."""

    def __init__(self, block: SparseBottleneck) -> None:
        super().__init__()
        self.downsample = block.downsample
        self.conv1 = MaskedConv2d(block.conv1, block.bn1, "relu")
        self.conv2 = MaskedConv2d(block.conv2, block.bn2, "relu")
        self.conv3 = MaskedConv2d(block.conv3, block.bn3)
        self.masker = CanonicalMaskUnit(block.masker, stride=self.conv2.stride, reach=self.conv2.dilation)

    @_either_call
    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(identity + mask * F(x)); (B, inplanes, H, W) to (B, 4 * planes, h, w)."""
        _, mask, dilated = self.masker(x)
        identity = x if self.downsample is None else self.downsample(x)
        y = self.conv2(self.conv1(x, dilated), mask)
        return F.relu(identity + self.conv3(y, mask))


class CanonicalInvertedResidual(nn.Module):
    """InvertedResidual on ``edgedyn::masked_conv2d``."""

    def __init__(self, block: SparseInvertedResidual) -> None:
        super().__init__()
        expand, expand_norm, _, depthwise, depthwise_norm, _, project, project_norm = block.conv
        self.masker = CanonicalMaskUnit(block.masker)
        self.expand = MaskedConv2d(expand, expand_norm, "relu6")  # type: ignore[arg-type]
        self.depthwise = MaskedConv2d(depthwise, depthwise_norm, "relu6")  # type: ignore[arg-type]
        self.project = MaskedConv2d(project, project_norm)  # type: ignore[arg-type]

    @_either_call
    def forward(self, x: Tensor) -> Tensor:
        """Return x + mask * F(x); (B, C, H, W) both."""
        _, mask, dilated = self.masker(x)
        y = self.depthwise(self.expand(x, dilated), mask)
        y = x + self.project(y, mask)
        return y  # type: ignore[no-any-return]


def _is_sparse(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> bool:
    """Tell whether a block has a mask head, from its arguments or else from its weights."""
    return bool(arguments.get("sparse", any(key.startswith("masker.") for key in state_dict)))


def _block_options(arguments: Mapping[str, Any], refused: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Return a block's arguments under our names; ``refused``: name -> (the only accepted value, reason)."""
    for name, (expected, reason) in refused.items():
        if arguments.get(name, expected) != expected:
            raise ModelError(
                f"a block of the authors got {name}={arguments[name]!r}; expected {expected!r}: {reason}. "
                "Leave it out."
            )
    ours = {"with_downsample": "downsample"}
    left_out = {"block", "name", "cls", "sparse", "cfg", *refused}
    return {ours.get(name, name): value for name, value in arguments.items() if name not in left_out}


def _basic_block(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    refused = {
        "groups": (1, "their BasicBlock asserts it"),
        "dilation": (1, "their BasicBlock asserts it"),
        "base_width": (64, "their BasicBlock ignores it"),
        "norm_layer": (None, "their BasicBlock ignores it"),
    }
    options = _block_options(arguments, refused)
    return (SparseBasicBlock if _is_sparse(arguments, state_dict) else BasicBlock)(**options)


def _bottleneck(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    options = _block_options(arguments, {"norm_layer": (None, "BatchNorm is folded, others are not")})
    return (SparseBottleneck if _is_sparse(arguments, state_dict) else Bottleneck)(**options)


def _inverted_residual(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    sparse = _is_sparse(arguments, state_dict)
    return (SparseInvertedResidual if sparse else InvertedResidual)(**_block_options(arguments, {}))


def _mask_unit(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    options = {"stride": 1, "dilate_stride": 1, **arguments}
    if unknown := options.keys() - {"channels", "stride", "dilate_stride"}:
        raise TypeError(f"unexpected arguments {sorted(unknown)}")
    head = PointMaskHead if "maskconv.weight" in state_dict else PooledMaskHead
    return MaskUnit(head(options["channels"], options["stride"]), options["dilate_stride"])


def _recognise_block(foreign: Any, make: Callable[[Any], nn.Module]) -> nn.Module | None:
    """Adopt a block that carries a mask head; one without is an ordinary module."""
    if getattr(foreign, "masker", None) is None:
        return None
    require(bool(getattr(foreign, "sparse", True)), foreign, "has a masker but sparse=False")
    return require_outputs(adopt(make, foreign), foreign)


def _make_basic_block(foreign: Any) -> nn.Module:
    conv = foreign.conv1
    return SparseBasicBlock(
        conv.in_channels, conv.out_channels, conv.stride[0], downsample=foreign.downsample is not None
    )


def _make_bottleneck(foreign: Any) -> nn.Module:
    conv, planes = foreign.conv2, foreign.conv3.out_channels // 4
    return SparseBottleneck(
        foreign.conv1.in_channels,
        planes,
        conv.stride[0],
        downsample=foreign.downsample is not None,
        groups=conv.groups,
        base_width=64 * (conv.out_channels // conv.groups + 0.5) / planes,  # the half is cut off again
        dilation=conv.dilation[0],
    )


def _recognise_inverted_residual(foreign: Any) -> nn.Module | None:
    block = _recognise_block(foreign, _make_inverted_residual)
    for norm in block.modules() if block else ():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-5  # the constant of the authors' sparse evaluation, which ignores the module's
    return block


def _make_inverted_residual(foreign: Any) -> nn.Module:
    expand, depthwise, project = foreign.conv[0], foreign.conv[3], foreign.conv[6]
    inp, ratio = expand.in_channels, expand.out_channels / expand.in_channels
    return SparseInvertedResidual(inp, project.out_channels, depthwise.stride[0], expand_ratio=ratio)


def _recognise_mask_unit(foreign: Any) -> nn.Module | None:
    head = getattr(foreign, "maskconv", None)
    if head is None:
        return None

    def make(foreign: Any) -> nn.Module:
        is_point = isinstance(head, nn.Conv2d)
        conv = head if is_point else head.conv
        ours = (PointMaskHead if is_point else PooledMaskHead)(conv.in_channels, conv.stride[0])
        return MaskUnit(ours, foreign.expandmask.stride)

    unit = adopt(make, foreign)
    assert isinstance(unit, MaskUnit)
    return AuthorsMaskUnit(unit)


def _examples() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yield reference modules in evaluation mode, each with an input that discriminates (B >= 2, H != W)."""
    generator = torch.Generator().manual_seed(17)
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (SparseBasicBlock(6, 6), (2, 6, 13, 18)),
        (SparseBasicBlock(5, 8, 2, downsample=True), (2, 5, 17, 12)),
        (SparseBottleneck(16, 4), (2, 16, 9, 14)),
        (SparseBottleneck(6, 4, 2, downsample=True, groups=2), (3, 6, 15, 10)),
        (SparseBottleneck(6, 4, 3, downsample=True, dilation=2), (2, 6, 14, 19)),
        (SparseInvertedResidual(6, 6), (2, 6, 11, 16)),
    ]
    for module, shape in cases:
        yield module.eval(), (torch.randn(shape, generator=generator),)


LAYER = Layer(
    name="dynconv",
    paper="DynConv (arXiv 1912.03203)",
    primitive="masked_conv2d",
    canonical={
        SparseBasicBlock: CanonicalBasicBlock,
        SparseBottleneck: CanonicalBottleneck,
        SparseInvertedResidual: CanonicalInvertedResidual,
    },
    examples=_examples,
    authors={
        "MaskUnit": _mask_unit,
        "BasicBlock": _basic_block,
        "Bottleneck": _bottleneck,
        "InvertedResidual": _inverted_residual,
    },
    recognise={
        "MaskUnit": _recognise_mask_unit,
        "BasicBlock": functools.partial(_recognise_block, make=_make_basic_block),
        "Bottleneck": functools.partial(_recognise_block, make=_make_bottleneck),
        "InvertedResidual": _recognise_inverted_residual,
    },
    float32=(PooledMaskHead, PointMaskHead, Selection),
)
