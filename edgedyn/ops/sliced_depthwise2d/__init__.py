"""Depthwise filtering with kernels sliced from a low-resolution grid at every pixel.

    k[b, t, c, p] = sum_ij lerp_y(p, i) * lerp_x(p, j) * grid[b, t * F + c // share, i, j]
    y[b, c, p]    = sum_t k[b, t, c, p] * x[b, c, p + off(t)]  (+ the same lerp of offset[b, c // share] at p)

x, y: (B, C, H, W)   grid: (B, T * F, gh, gw)   offset: (B, F, gh, gw) or None
F filters, share = C // F, T = R * R taps

Zero padding, stride 1, odd R. Centres are half-pixel and clamped at the border (``align_corners=False``) or
corner to corner. Grids are tap-major, so that every form reads a tap with one channel slice: XNNPACK then
takes the whole layer as 1 delegate, where channel-major leaves one select_copy per tap outside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError
from edgedyn.ops import Op, register
from edgedyn.ops.sliced_depthwise2d.forms import FORMS

_SCHEMA = (
    "(Tensor x, Tensor grid, Tensor? offset, int kernel_size, int dilation=1, bool align_corners=False)"
    " -> Tensor"
)


def _lerp(size: int, cells: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lower cell, the upper cell and the upper cell's weight for each of ``size`` pixels."""
    pixel = torch.arange(size, dtype=torch.float64)
    if align_corners:
        position = pixel * ((cells - 1) / max(size - 1, 1))
    else:
        position = ((pixel + 0.5) * (cells / size) - 0.5).clamp(min=0)
    low = position.floor().long().clamp(max=cells - 1)
    return low, (low + 1).clamp(max=cells - 1), position - low


def _slice(grid: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """Upsample (B, n, gh, gw) to (B, n, height, width) by the definition of bilinear interpolation."""
    top, bottom, down = (v.to(grid.device) for v in _lerp(height, grid.shape[2], align_corners))
    left, right, across = (v.to(grid.device) for v in _lerp(width, grid.shape[3], align_corners))
    down, across = down.to(grid.dtype).view(-1, 1), across.to(grid.dtype)
    rows = grid[:, :, top] * (1 - down) + grid[:, :, bottom] * down
    return rows[:, :, :, left] * (1 - across) + rows[:, :, :, right] * across


def oracle(
    x: Tensor,
    grid: Tensor,
    offset: Tensor | None,
    kernel_size: int,
    dilation: int = 1,
    align_corners: bool = False,
) -> Tensor:
    """Compute the op by its definition; slow, it materialises every kernel."""
    _check(x, grid, offset, kernel_size, dilation)
    h, w = x.shape[2:]
    filters = grid.shape[1] // kernel_size**2
    share = x.shape[1] // filters
    padding = dilation * (kernel_size // 2)
    padded = F.pad(x, (padding,) * 4)
    y = torch.zeros_like(x)
    for tap in range(kernel_size**2):
        kernel = _slice(grid[:, tap * filters : (tap + 1) * filters], h, w, align_corners)
        dy, dx = dilation * (tap // kernel_size), dilation * (tap % kernel_size)
        y = y + kernel.repeat_interleave(share, dim=1) * padded[:, :, dy : dy + h, dx : dx + w]
    return y if offset is None else y + _slice(offset, h, w, align_corners).repeat_interleave(share, dim=1)


def _fake(
    x: Tensor,
    grid: Tensor,
    offset: Tensor | None,
    kernel_size: int,
    dilation: int = 1,
    align_corners: bool = False,
) -> Tensor:
    _check(x, grid, offset, kernel_size, dilation)
    return torch.empty_like(x)


def _check(x: Tensor, grid: Tensor, offset: Tensor | None, kernel_size: int, dilation: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0 or dilation < 1:
        raise ModelError(
            f"sliced_depthwise2d got kernel_size={kernel_size}, dilation={dilation}; expected an odd "
            "kernel_size >= 1 and dilation >= 1. Even kernels have no centre pixel: retrain with an odd one."
        )
    if x.dim() != 4 or grid.dim() != 4 or x.shape[0] != grid.shape[0]:
        raise ModelError(
            f"sliced_depthwise2d got x {tuple(x.shape)} and grid {tuple(grid.shape)}; expected (B, C, H, W) "
            "and (B, T * F, gh, gw) of the same batch B. Reshape the grid tap-major."
        )
    filters, rest = divmod(grid.shape[1], kernel_size**2)
    if rest or filters == 0 or x.shape[1] % filters:
        raise ModelError(
            f"sliced_depthwise2d got a grid of {grid.shape[1]} channels for {kernel_size**2} taps and x of "
            f"{x.shape[1]} channels; expected T * F grid channels where F divides the channels of x."
        )
    if offset is not None and tuple(offset.shape) != (x.shape[0], filters, *grid.shape[2:]):
        raise ModelError(
            f"sliced_depthwise2d got offset {tuple(offset.shape)}; expected "
            f"{(x.shape[0], filters, *grid.shape[2:])}: one offset per filter on the grid's own cells."
        )


_OVERLOAD = register("sliced_depthwise2d", _SCHEMA, oracle, _fake)


def sliced_depthwise2d(
    x: Tensor,
    grid: Tensor,
    offset: Tensor | None,
    kernel_size: int,
    dilation: int = 1,
    align_corners: bool = False,
) -> Tensor:
    """Filter x with the kernel sliced from the grid at every pixel (arXiv 2201.00392, eq. 3); one graph node.

    Args:
        x: (B, C, H, W).
        grid: (B, T * F, gh, gw), tap-major, taps row-major; ``C // F`` consecutive channels share a filter.
        offset: (B, F, gh, gw), added after slicing, or None.
        kernel_size: odd R, T = R * R. R = 1 with offset is the affine form.
        dilation: distance between taps, pixels.
        align_corners: grid alignment; a silent mismatch is the likeliest accuracy bug, so it is never
            inferred.

    Returns:
        (B, C, H, W), the dtype of x.

    Raises:
        ModelError: for numbers out of range, or shapes that do not fit together.
    """
    return torch.ops.edgedyn.sliced_depthwise2d(x, grid, offset, kernel_size, dilation, align_corners)  # type: ignore[no-any-return]


def _examples() -> Iterator[tuple[Tensor, Tensor, Tensor | None, int, int, bool]]:
    """Yield the op's arguments in order: odd sizes, shared filters, R = 1, dilation 2, aligned corners."""
    generator = torch.Generator().manual_seed(7)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield rand(2, 6, 17, 23), rand(2, 9 * 6, 3, 5), None, 3, 1, False
    yield rand(2, 8, 12, 20), rand(2, 9 * 2, 3, 4), rand(2, 2, 3, 4), 3, 1, False
    yield rand(3, 4, 11, 8), rand(3, 4, 2, 4), rand(3, 4, 2, 4), 1, 1, False
    yield rand(2, 3, 20, 15), rand(2, 25 * 3, 5, 3), rand(2, 3, 5, 3), 5, 1, False
    yield rand(2, 4, 14, 9), rand(2, 9 * 2, 7, 3), None, 3, 2, False
    yield rand(2, 4, 13, 10), rand(2, 9 * 4, 4, 5), rand(2, 4, 4, 5), 3, 1, True
    yield rand(2, 2, 3, 4), rand(2, 9 * 2, 5, 7), None, 3, 1, False


def _apply_macs(
    x: Tensor, grid: Tensor, offset: Tensor | None, kernel_size: int, *rest: int, **options: object
) -> int:
    """Count slicing, 4 per pixel and kernel or offset value, and applying, 1 per tap and element."""
    b, c, h, w = x.shape
    slices = grid.shape[1] + (0 if offset is None else offset.shape[1])
    return b * h * w * (4 * slices + kernel_size**2 * c)


OP = Op(
    name="sliced_depthwise2d",
    overload=_OVERLOAD,
    forms=FORMS,
    examples=_examples,
    generated=("grid", "offset"),
    apply_macs=_apply_macs,
)
