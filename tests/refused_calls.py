"""Calls that each break one precondition of an ExecuTorch kernel, by the words that it has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, empty

# Every extent differs; what follows has the schema's default.
GOOD: dict[str, tuple[Any, ...]] = {
    "sliced_depthwise2d": (
        torch.rand(2, 4, 6, 8),
        torch.rand(2, 18, 3, 5),
        torch.rand(2, 2, 3, 5),
        3,
    ),
    "decoupled_depthwise2d": (
        torch.rand(2, 4, 6, 8),
        torch.rand(2, 36, 1, 1),
        torch.rand(2, 18, 6, 8),
        *(3, 1, 1, 2),
    ),
    "atom_depthwise2d": (torch.rand(2, 4, 6, 8), torch.rand(2, 6, 6, 8), torch.rand(2, 9), 3),
    "masked_conv2d": (
        torch.rand(2, 4, 6, 8),
        torch.rand(6, 2, 3, 3),
        torch.rand(6),
        torch.ones(2, 1, 6, 8),
        *(1, 1, 1, 2),
    ),
    "inverted_residual": (
        torch.rand(2, 4, 6, 8),
        *(torch.rand(7, 4, 1, 1), torch.rand(7), torch.rand(7)),
        *(torch.rand(7, 1, 3, 3), torch.rand(7), None),
        *(torch.rand(5, 7, 1, 1), torch.rand(5), None),
        torch.ones(2, 1, 6, 8),
        *("prelu", "relu6"),
    ),
}
Changes = list[dict[str, Any]]


def each(**wrong: list[Any]) -> Changes:
    """Return one change for every value."""
    return [{name: value} for name, values in wrong.items() for value in values]


def turned(*shape: int) -> Tensor:
    return empty(shape).to(memory_format=torch.channels_last)


def ill_typed(*shape: int) -> list[Tensor]:
    return [empty(shape, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.int8)]


def not_dense(*shape: int) -> list[Tensor]:
    return [*ill_typed(*shape), empty(shape[1:]), turned(*shape)]


X = [*not_dense(2, 4, 6, 8), empty(2, 4, 8, 6).transpose(2, 3)]
INT8 = {
    "expected scales > 0 and zero points in [-128, 127]": each(
        x_scale=[0.0, float("nan")], y_scale=[-1.0], x_zero_point=[128, 2**32], y_zero_point=[-129]
    )
}

SLICED = {
    "expected x as a contiguous (B, C, H, W) of the op's type": each(x=X),
    "expected grid as a contiguous (B, T * F, gh, gw) of float": each(grid=not_dense(2, 18, 3, 5)),
    "expected an odd kernel_size and dilation >= 1": each(kernel_size=[0, 2, -3], dilation=[0, -1]),
    "expected a grid of T * F channels where F divides the channels of x, and the batch of x": each(
        grid=[empty(1, 18, 3, 5), empty(2, 8, 3, 5), empty(2, 19, 3, 5), empty(2, 27, 3, 5)], kernel_size=[5]
    ),
    "expected a grid of at least one cell": each(grid=[empty(2, 18, 0, 5), empty(2, 18, 3, 0)]),
    "expected an offset of one channel per filter on the grid's cells": each(
        offset=[
            empty(1, 2, 3, 5),
            empty(2, 3, 3, 5),
            empty(2, 2, 4, 5),
            empty(2, 2, 3, 4),
            *not_dense(2, 2, 3, 5),
        ]
    ),
    "out cannot hold y of the shape of x": each(out=[empty(2, 4, 6, 7), *not_dense(2, 4, 6, 8)]),
    "kernel_size %ld at dilation %ld needs more than 64 KiB of scratch": [
        {"dilation": 99},
        {"kernel_size": 27, "grid": empty(2, 2 * 27**2, 3, 5)},
    ],
    **INT8,
}

DECOUPLED = {
    "expected an odd kernel_size, stride >= 1 and dilation >= 1": each(
        kernel_size=[0, 4, -1], stride=[0], dilation=[0]
    ),
    "expected combine as 'mul' or 'add'": each(combine=["max", ""]),
    "expected x as a contiguous (B, C, H, W) of the op's type": each(x=X),
    "expected heads to divide the channels of x": each(heads=[0, 3]),
    "expected spatial_filter as contiguous, 4 axes of float": each(spatial_filter=not_dense(2, 18, 6, 8)),
    "expected spatial_filter as (B, T * G, H // stride, W // stride), not empty": [
        *each(
            spatial_filter=[empty(1, 18, 6, 8), empty(2, 9, 6, 8), empty(2, 19, 6, 8), empty(2, 18, 5, 8)],
            stride=[2],
            kernel_size=[2**32 + 1],
        ),
        {"stride": 7, "spatial_filter": empty(2, 18, 0, 1)},
    ],
    "expected channel_filter as a contiguous (B, T * C, 1, 1) of float": each(
        channel_filter=[
            *(empty(1, 36, 1, 1), empty(2, 35, 1, 1), empty(2, 36, 2, 1), empty(2, 36, 1, 2)),
            *(*ill_typed(2, 36, 1, 1), empty(2, 36)),
        ]
    ),
    "out cannot hold y (B, C, H // stride, W // stride) of the type of x": each(
        out=[empty(2, 4, 6, 7), *not_dense(2, 4, 6, 8)]
    ),
    "kernel_size %ld, stride %ld and dilation %ld need more than 64 KiB of scratch": [
        {"dilation": 9999},
        {
            "kernel_size": 29,
            "channel_filter": empty(2, 4 * 29**2, 1, 1),
            "spatial_filter": empty(2, 2 * 29**2, 6, 8),
        },
    ],
    **INT8,
}

ATOMS = {
    "expected x as a contiguous (B, C, H, W) of the op's type": each(x=X),
    "expected alpha as a contiguous (B, M * K, h, w) of float": each(alpha=not_dense(2, 6, 6, 8)),
    "expected an odd kernel_size and stride >= 1": each(kernel_size=[2, 0, -1], stride=[0]),
    "expected bases as a contiguous (K, kernel_size ** 2) of float, K >= 1": each(
        bases=[*ill_typed(2, 9), empty(9), empty(0, 9), empty(2, 8), empty(2, 6), empty(9, 2).t()],
        kernel_size=[5],
    ),
    "expected an alpha of M * K channels, and the batch of x": each(
        alpha=[empty(1, 6, 6, 8), empty(2, 5, 6, 8), empty(2, 0, 6, 8)]
    ),
    "alpha has %ld x %ld pixels; expected one kernel per output pixel, %ld x %ld": each(
        alpha=[empty(2, 6, 5, 8), empty(2, 6, 6, 7)], stride=[2]
    ),
    "out cannot hold y, expected (B, M * C, h, w) of the type of x": each(
        out=[empty(2, 4, 6, 8), *not_dense(2, 12, 6, 8)]
    ),
    "%ld bases of kernel_size %ld at stride %ld need more than 64 KiB of scratch": [
        {"kernel_size": 31, "bases": empty(2, 31**2)},
        {"bases": empty(1200, 9), "alpha": empty(2, 1200, 6, 8), "out": empty(2, 4, 6, 8)},
    ],
    **INT8,
}

MASKED = {
    "expected the activation none, relu or relu6": each(activation=["gelu", ""]),
    "expected padding >= 0, and stride, dilation and groups >= 1": each(
        padding=[-1], stride=[0], dilation=[0], groups=[0]
    ),
    "expected x as a contiguous (B, I, H, W) of the op's type, at least one channel and pixel": each(
        x=[*X, empty(2, 4, 0, 8), empty(2, 0, 6, 8)]
    ),
    "expected weight as a contiguous (O, I / groups, R, R) of float": each(
        weight=[empty(6, 2, 3, 1), empty(6, 2, 0, 0), *not_dense(6, 2, 3, 3)]
    ),
    "expected I / groups channels per kernel, and groups to divide O": each(
        weight=[empty(5, 2, 3, 3), empty(6, 3, 3, 3)], groups=[1]
    ),
    "expected bias as one float per output channel": each(bias=[empty(5), empty(6, 1), *ill_typed(6)]),
    "expected a kernel that fits the padded x": [{"dilation": 4}, {"padding": 0, "x": empty(2, 4, 2, 8)}],
    "expected mask as a contiguous (B, 1, h, w) of float, one value per position of the output": each(
        mask=[
            *(empty(1, 1, 6, 8), empty(2, 2, 6, 8), empty(2, 1, 5, 8), empty(2, 1, 6, 7), empty(2, 1, 48)),
            *ill_typed(2, 1, 6, 8),
        ],
        stride=[2],
    ),
    "expected a mask of 0 and 1 only": each(
        mask=[torch.full((2, 1, 6, 8), value) for value in (0.5, -1.0, float("nan"), float("inf"))]
    ),
    "out cannot hold y": each(out=[empty(2, 4, 6, 8), *not_dense(2, 6, 6, 8)]),
    **INT8,
}

OF_WEIGHTS = {"expand": 1, "depthwise": 4, "project": 7}  # places in a call
INVERTED = {
    "expected activations none, relu, relu6, prelu or hardswish": each(
        expand_activation=["gelu", ""], depthwise_activation=["silu"], project_activation=["Relu"]
    ),
    "expected x as a contiguous (B, C, H, W) of float, at least one channel and pixel": each(
        x=[*X, empty(2, 4, 0, 8), empty(2, 0, 6, 8)]
    ),
    "expected weights as contiguous (outputs, inputs, R, R) of the op's type, on the channels before": [
        *each(expand=[empty(7, 3, 1, 1), empty(0, 4, 1, 1), empty(7, 4), *ill_typed(7, 4, 1, 1)]),
        *each(depthwise=[empty(7, 2, 3, 3), *not_dense(7, 1, 3, 3)[:4], turned(7, 3, 3, 3)]),
        *each(project=[empty(0, 7, 1, 1), empty(5, 6, 1, 1), empty(5, 7), *ill_typed(5, 7, 1, 1)]),
        *({name: GOOD["inverted_residual"][k], "x_scale": 0.1} for name, k in OF_WEIGHTS.items()),
    ],
    "expected int8 weights from -127 to 127": [
        {name: torch.full(GOOD["inverted_residual"][k].shape, -128, dtype=torch.int8), "x_scale": 0.1}
        for name, k in OF_WEIGHTS.items()
    ],
    "expected 1 x 1 weights around a depthwise one of 3 x 3 or 5 x 5, one kernel per hidden channel": [
        *each(expand=[empty(7, 4, 1, 3), empty(7, 4, 3, 1)], project=[empty(5, 7, 3, 3), empty(5, 7, 1, 2)]),
        *each(depthwise=[empty(7, 1, 3, 5), empty(7, 1, 5, 3), empty(7, 1, 7, 7), empty(7, 1, 1, 1)]),
        *each(depthwise=[empty(7, 1, 4, 4), empty(7, 1, 0, 0)]),
        {"depthwise": empty(8, 1, 3, 3), "depthwise_bias": empty(8)},
        {"depthwise": empty(6, 1, 5, 5), "depthwise_bias": empty(6)},
    ],
    "expected biases and scales as one float per output channel": each(
        expand_bias=[empty(8), *ill_typed(7)],
        depthwise_bias=[empty(6), empty(7, 1)],
        project_bias=[empty(7), *ill_typed(5)],
        expand_scales=[empty(6), empty(7, 1), *ill_typed(7)],
        depthwise_scales=[empty(8), empty(1)],
        project_scales=[empty(7), *ill_typed(5)],
    ),
    "expected slopes of a prelu, and of nothing else, as one float per output channel": each(
        expand_slopes=[None, empty(6), empty(1), empty(7, 1), *ill_typed(7)],
        depthwise_slopes=[empty(7)],
        project_slopes=[empty(5)],
        expand_activation=["relu"],
        depthwise_activation=["prelu"],
        project_activation=["prelu"],
    ),
    "expected stride 1 or 2": each(stride=[0, 3, -1, 2**32 + 1]),
    "expected a residual only where y has the shape of x": [
        {"residual": True},
        {
            "residual": True,
            "stride": 2,
            "mask": torch.ones(2, 1, 3, 4),
            "project": empty(4, 7, 1, 1),
            "project_bias": empty(4),
        },
    ],
    "expected mask as a contiguous (B, 1, h, w) of float, one value per position of y": each(
        mask=[
            *(empty(1, 1, 6, 8), empty(2, 2, 6, 8), empty(2, 1, 5, 8), empty(2, 1, 6, 7), empty(2, 1, 48)),
            *ill_typed(2, 1, 6, 8),
        ],
        stride=[2],
    ),
    "expected a mask of 0 and 1 only": each(
        mask=[torch.full((2, 1, 6, 8), value) for value in (0.5, -1.0, float("nan"), float("inf"))]
    ),
    "out cannot hold y": each(out=[empty(2, 4, 6, 8), *not_dense(2, 5, 6, 8)]),
    "expected scales > 0 and zero points in [-128, 127]": each(
        x_scale=[0.0, float("nan")],
        hidden_scale=[-1.0],
        filtered_scale=[0.0],
        x_zero_point=[128],
        hidden_zero_point=[-129],
        filtered_zero_point=[2**32],
    ),
}

REFUSED: dict[str, dict[str, Changes]] = {
    "sliced_depthwise2d": SLICED,
    "decoupled_depthwise2d": DECOUPLED,
    "atom_depthwise2d": ATOMS,
    "masked_conv2d": MASKED,
    "inverted_residual": INVERTED,
}
