"""Sums of taps for runtimes that compute operators one by one, in the graph's order.

    y(p) = sum_dy z[dy](p + dy),   z[dy](p) = sum_dx kernel[dy, dx](p - dy) * x(p + dx)

The taps of one row share the rows of x, and their sum is shifted: R shifts of x and R of sums, not R * R of
x. A run of channels passes through all of it before the next begins, so that its activations stay in the
cache.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

RUN_ELEMENTS = 2**20  # per feature map of a run: 4 MB; a last-level cache holds a handful of such maps
MOST_RUNS = 8  # each repeats the graph of the op: some 40 nodes at R = 3, and lowering takes 30 ms per node


def sum_taps(
    x: Tensor,
    kernel: Callable[[int, int, range], Tensor],
    kernel_size: int,
    dilation: int,
    *,
    runs: Iterable[range],
    below: int = 0,
    offset: Callable[[range], Tensor] | None = None,
) -> Tensor:
    """Filter x with its own kernel at every pixel, zero-padded, stride 1.

    Args:
        x: (B, C, H, W).
        kernel: ``kernel(dy, dx, run)``: tap (dy, dx) of a run of channels, (B, len(run), rows, W) where
            rows = H + 2 * reach + below and reach = dilation * (R // 2). Pixel row h uses row
            ``h + dy * dilation``; rows that no pixel uses may hold anything.
        kernel_size: odd R.
        dilation: distance between taps, pixels.
        runs: ranges of channels, computed one after the other; see ``cut``.
        below: rows that kernels have beyond the padded x.
        offset: ``offset(run)``, added to y: (B, len(run), rows, W), pixel row h uses row ``h + reach``.

    Returns:
        (B, C, H, W).
    """
    height, width = x.shape[2:]
    reach = dilation * (kernel_size // 2)
    parts = []
    for run in runs:
        frame = take(x, 1, run.start, len(run))
        if reach or below:
            frame = F.pad(frame, (reach, reach, reach, reach + below))
        shifted = [take(frame, 3, dx * dilation, width) for dx in range(kernel_size)]

        def sum_row(dy: int, run: range = run, shifted: list[Tensor] = shifted) -> Tensor:
            z = reduce(operator.add, (kernel(dy, dx, run) * pixels for dx, pixels in enumerate(shifted)))
            if offset is not None and dy == kernel_size // 2:
                z = z + offset(run)
            return take(z, 2, dy * dilation, height)

        parts.append(reduce(operator.add, map(sum_row, range(kernel_size))))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def cut(channels: int, elements: int, within: int | None = None) -> list[range]:
    """Cut channels of ``elements`` pixels into runs that fit the cache and blocks of ``within`` channels."""
    within = within or channels
    count = min(max(1, RUN_ELEMENTS // elements, -(-channels // MOST_RUNS)), within)
    return [
        range(first, min(first + count, block + within))
        for block in range(0, channels, within)
        for first in range(block, block + within, count)
    ]


def take(x: Tensor, axis: int, first: int, size: int) -> Tensor:
    """Return a range of an axis, or x itself for the whole axis, whose slice would be an alias."""
    return x if x.shape[axis] == size else x.narrow(axis, first, size)
