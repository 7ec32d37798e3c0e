"""Calls of each op around the sizes at which its kernel cuts its work: one less, that many, one more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kernel_check import with_defaults
from op_calls import OPS, OpCall, to_int8
from torch import Tensor

_GENERATOR = torch.Generator().manual_seed(3)


def around(*sizes: int) -> list[int]:
    return [size + step for size in sizes for step in (-1, 0, 1)]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


def _sliced(h: int, w: int, *, cells: int = 3, side: int = 3, channels: int = 1) -> tuple[Any, ...]:
    grid = rand(1, side * side, 2, cells)
    return rand(1, channels, h, w), grid, rand(1, 1, 2, cells), side


def _decoupled(h: int, w: int, *, channels: int = 2, side: int = 3, stride: int = 1) -> tuple[Any, ...]:
    taps, size = side * side, (h // stride, w // stride)
    return rand(1, channels, h, w), rand(1, taps * channels, 1, 1), rand(1, taps, *size), side, stride


def _atoms(h: int, w: int, *, kernels: int = 2, channels: int = 2, stride: int = 1) -> tuple[Any, ...]:
    size = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    return rand(1, channels, h, w), rand(1, 3 * kernels, *size), rand(3, 9), 3, stride


def _masked(h: int, w: int, *, depth: int = 2, outputs: int = 2, groups: int = 1) -> tuple[Any, ...]:
    side = 1 if depth > 2 else 3
    mask = (torch.rand(1, 1, h, w, generator=_GENERATOR) < 0.5).float()
    weight = rand(outputs * groups, depth if groups == 1 else 1, side, side)
    channels = depth if groups == 1 else groups
    return rand(1, channels, h, w), weight, rand(outputs * groups), mask, 1, side // 2, 1, groups, "relu"


def _inverted(
    h: int,
    w: int,
    *,
    sizes: tuple[int, int, int] = (3, 5, 2),
    side: int = 3,
    stride: int = 1,
    masked: int = 0,
) -> tuple[Any, ...]:
    (channels, hidden, outputs), size = sizes, ((h - 1) // stride + 1, (w - 1) // stride + 1)
    mask = (torch.rand(1, 1, *size, generator=_GENERATOR) < 0.3).float() if masked else None
    return (
        rand(1, channels, h, w),
        *(rand(hidden, channels, 1, 1), rand(hidden), rand(hidden)),
        *(rand(hidden, 1, side, side), rand(hidden), None),
        *(rand(outputs, hidden, 1, 1), rand(outputs), None),
        mask,
        *("prelu", "relu6", "none", stride, channels == outputs),
    )


# vectors hold 16 floats at most
BOUNDARIES: dict[str, list[tuple[Any, ...]]] = {
    "sliced_depthwise2d": [
        *(_sliced(h, 5) for h in around(4, 8, 128)),
        *(_sliced(3, w) for w in around(16, 256)),
        *(_sliced(3, 40, cells=cells) for cells in around(4, 8, 16, 40)),
        # the pixels of a vector of 4, 8 or 16 floats span one cell more than it has lanes
        *(_sliced(3, width, cells=cells) for width, cells in ((24, 32), (21, 24), (30, 32))),
        *(_sliced(9, w, side=1) for w in around(4, 16)),
        *(_sliced(5, 7, side=side) for side in (5, 21)),
    ],
    "decoupled_depthwise2d": [
        *(_decoupled(h, 5) for h in around(4, 8)),
        *(_decoupled(2, w) for w in around(16, 256, 368)),
        *(_decoupled(8, w, stride=stride) for w in around(32) for stride in (2, 3)),
        *(_decoupled(2, 3, channels=channels) for channels in around(32, 64)),
        *(_decoupled(5, 7, side=side) for side in (5, 21, 27)),
    ],
    "atom_depthwise2d": [
        *(_atoms(2, w) for w in around(16, 128, 256)),
        *(_atoms(3, w, stride=stride) for w in around(32, 257) for stride in (2, 4)),
        *(_atoms(2, 5, kernels=kernels) for kernels in around(3, 6, 12)),
        *(_atoms(2, 5, channels=channels) for channels in around(4, 8)),
    ],
    "masked_conv2d": [
        *(_masked(1, w, depth=3) for w in around(32, 512, 8192)),
        *(_masked(2, 3, depth=3, outputs=outputs) for outputs in around(4, 128)),
        *(_masked(3, 20, depth=depth) for depth in around(192, 384)),
        *(_masked(h, 5, groups=3) for h in around(4, 16)),
        *(_masked(3, w, groups=3) for w in around(16, 128)),
        *(_masked(3, 4, groups=groups) for groups in around(16)),
    ],
    "inverted_residual": [
        *(_inverted(3, w, masked=w % 2) for w in around(4, 8, 16, 32, 64, 128, 256, 512)),
        *(_inverted(2, w, stride=2, masked=w % 2) for w in around(8, 16, 32, 64, 256, 512)),
        *(_inverted(h, 5, stride=stride, masked=h % 2) for h in around(2, 4, 8) for stride in (1, 2)),
        *(_inverted(h, 9, side=5, stride=stride) for h in around(2, 5) for stride in (1, 2)),
        *(_inverted(3, w, side=5) for w in around(2, 16, 64)),
        *(_inverted(3, 7, sizes=(channels, 5, 2)) for channels in around(4, 8, 16, 32, 64)),
        *(_inverted(3, 7, sizes=(3, hidden, 3)) for hidden in around(4, 8, 16, 32, 64, 320)),
        *(_inverted(3, 7, sizes=(3, 5, outputs)) for outputs in around(4, 8, 16, 32, 64)),
        *(_inverted(1, 1, sizes=(1, hidden, 1), masked=hidden) for hidden in around(1, 16)[1:]),
    ],
}


def boundary_calls(name: str) -> Iterator[OpCall]:
    """Yield each call with float32 and with INT8, all tensors one element behind a 64-byte line."""
    for args in BOUNDARIES[name]:
        call = OpCall(OPS[name], with_defaults(OPS[name], args), shift=4)
        yield call
        yield to_int8(call)
