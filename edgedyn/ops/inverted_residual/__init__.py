"""Inverted residual: 1 x 1 convolution, depthwise convolution, 1 x 1 convolution, as one op.

    hidden[b, e, p]   = a1(expand_bias[e]    + sum_i expand[e, i]    * x[b, i, p])           0 outside of x
    filtered[b, e, p] = a2(depthwise_bias[e] + sum_t depthwise[e, t] * hidden[b, e, s p + off(t)])
    y[b, o, p]        = a3(project_bias[o]   + sum_e project[o, e]   * filtered[b, e, p])    0 where mask is 0
    y                += x                                                                    if residual

x: (B, C, H, W)   expand: (E, C, 1, 1)   depthwise: (E, 1, R, R), R 3 or 5   project: (O, E, 1, 1)
mask: (B, 1, h, w) or None   y: (B, O, h, w), h = (H - 1) // s + 1   s stride, 1 or 2   a activations

The hidden maps have several times as many channels as x and y, and the op exists so that a kernel keeps them
out of memory. The padding is of the hidden map.

``inverted_residual_int8`` has int8 weights with a scale per output channel, and a scale and zero point of x,
of the hidden and of the filtered map; it rounds each of them to INT8 as ``quantize_per_tensor`` does. x and y
are float, and x is added as it came. Other INT8 variants stand between dequantize and quantize, this one does
not: a lowering makes it from three quantized convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from edgedyn.ops import Op, define
from edgedyn.ops.inverted_residual.block import Block, Convolution
from edgedyn.ops.inverted_residual.definition import fake, fake_int8, oracle, oracle_int8
from edgedyn.ops.inverted_residual.forms import FORMS

_SCHEMA = (
    "Tensor x, Tensor expand, Tensor expand_bias, Tensor? expand_slopes,"
    " Tensor depthwise, Tensor depthwise_bias, Tensor? depthwise_slopes,"
    " Tensor project, Tensor project_bias, Tensor? project_slopes, Tensor? mask,"
    " str expand_activation='none', str depthwise_activation='none', str project_activation='none',"
    " int stride=1, bool residual=False"
)
_SCHEMA_INT8 = (
    "Tensor x, float x_scale, int x_zero_point,"
    " Tensor expand, Tensor expand_scales, Tensor expand_bias, Tensor? expand_slopes,"
    " float hidden_scale, int hidden_zero_point,"
    " Tensor depthwise, Tensor depthwise_scales, Tensor depthwise_bias, Tensor? depthwise_slopes,"
    " float filtered_scale, int filtered_zero_point,"
    " Tensor project, Tensor project_scales, Tensor project_bias, Tensor? project_slopes, Tensor? mask,"
    " str expand_activation, str depthwise_activation, str project_activation, int stride, bool residual"
)

_OVERLOAD = define("inverted_residual", _SCHEMA, oracle, fake)
define("inverted_residual_int8", _SCHEMA_INT8, oracle_int8, fake_int8)


def inverted_residual(
    x: Tensor,
    expand: Convolution,
    depthwise: Convolution,
    project: Convolution,
    mask: Tensor | None = None,
    stride: int = 1,
    residual: bool = False,
) -> Tensor:
    """Expand, filter and project x (MobileNetV2, arXiv 1801.04381, sec. 3.3); one graph node.

    A network need not call it: lowering with fused kernels makes it from three convolutions. A call stays
    float in an INT8 program; the recipe's ``forms: {inverted_residual: three_convolutions}`` makes it INT8.

    Args:
        x: (B, C, H, W).
        expand: weight (E, C, 1, 1).
        depthwise: weight (E, 1, R, R), R 3 or 5; its input is zero-padded by R // 2.
        project: weight (O, E, 1, 1).
        mask: (B, 1, h, w) of 0 and 1 in the type of x, at the resolution of y, or None.
        stride: of the depthwise convolution, 1 or 2 pixels.
        residual: add x, where O = C and the stride is 1.

    Returns:
        (B, O, h, w), h = (H - 1) // stride + 1; where the mask is 0, x with a residual and else 0.

    Raises:
        ModelError: for options out of range, or shapes or types that do not fit together; where the op
            computes (not in a trace), also for a mask with other values than 0 and 1.
    """
    convolutions = (expand, depthwise, project)
    tensors = [tensor for of in convolutions for tensor in of[:3]]
    activations = [of.activation for of in convolutions]
    return torch.ops.edgedyn.inverted_residual(  # type: ignore[no-any-return]
        x, *tensors, mask, *activations, stride, residual
    )


def _examples() -> Iterator[tuple[Any, ...]]:
    """Yield the op's arguments: odd sizes, stride 2, 5 x 5, each activation, mask, residual."""
    generator = torch.Generator().manual_seed(29)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def block(
        sizes: tuple[int, int, int], *activations: str, side: int = 3, stride: int = 1, residual: bool = False
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        channels, hidden, outputs = sizes
        weights = ((hidden, channels, 1, 1), (hidden, 1, side, side), (outputs, hidden, 1, 1))
        tensors: list[Tensor | None] = []
        for shape, activation in zip(weights, activations, strict=True):
            slopes = rand(shape[0]) * 0.3 if activation == "prelu" else None
            tensors += [rand(*shape), rand(shape[0]), slopes]
        return tuple(tensors), (*activations, stride, residual)

    def mask(*shape: int, density: float = 0.3) -> Tensor:
        return (torch.rand(shape, generator=generator) < density).float()

    tensors, options = block((5, 7, 4), "none", "none", "none")
    yield rand(2, 5, 17, 23), *tensors, None, *options
    tensors, options = block((6, 19, 6), "prelu", "prelu", "none", residual=True)
    yield rand(2, 6, 11, 14), *tensors, None, *options
    tensors, options = block((3, 35, 9), "relu6", "relu6", "none", stride=2)
    yield rand(2, 3, 13, 18), *tensors, None, *options
    tensors, options = block((4, 10, 5), "hardswish", "relu", "hardswish", side=5, stride=2)
    yield rand(3, 4, 8, 15), *tensors, mask(3, 1, 4, 8), *options
    tensors, options = block((7, 13, 7), "relu", "hardswish", "prelu", side=5, residual=True)
    full, empty = torch.ones(1, 1, 9, 6), torch.zeros(1, 1, 9, 6)
    yield rand(3, 7, 9, 6), *tensors, torch.cat([mask(1, 1, 9, 6), empty, full]), *options


def _apply_macs(x: Tensor, *rest: Any) -> int:
    """Count all three convolutions at every position, as for a full mask."""
    block = Block.read(rest[:10], rest[10:])
    expand, depthwise, project = (of.weight.numel() for _, of in block.convolutions)
    batch, _, height, width = block.output(x)
    return x.shape[0] * x.shape[2] * x.shape[3] * expand + batch * height * width * (depthwise + project)


OP = Op(
    name="inverted_residual",
    overload=_OVERLOAD,
    forms=FORMS,
    examples=_examples,
    generated=("mask",),
    apply_macs=_apply_macs,
    has_affine_int8=False,
)
