"""A form of ``sliced_depthwise2d``: interpolation by small matrix products, activations kept in the cache.

    kernel[t] = rows . grid[t] . columns'        rows, columns: static, (pixels, cells), hats around the cells

Interpolation is linear in the grid, so it is a product with a static matrix from either side. A band of pixel
rows reads a few rows of the grid, 3 where a cell is at least as high as the band, and is computed from these
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgedyn.ops.shifting import cut, sum_taps, take

BAND = 32  # rows that are interpolated from the same rows of the grid


def banded_shift_mac(
    x: Tensor,
    grid: Tensor,
    offset: Tensor | None,
    kernel_size: int,
    dilation: int = 1,
    align_corners: bool = False,
) -> Tensor:
    """Interpolate by small static matrix products and add taps row by row, one run of channels at a time.

    Exact: only the order of sums differs from the definition. No operator changes the memory layout of a
    feature map; a resize would, in XNNPACK.
    """
    channels, rows = x.shape[1], grid.shape[1] // kernel_size
    share = channels * kernel_size // rows
    bands = _Bands(x, grid, dilation * (kernel_size // 2), align_corners)
    taps = [share_filters(take(grid, 1, dy * rows, rows), share) for dy in range(kernel_size)]
    tables = [bands.pick(cells, dy * dilation) for dy, cells in enumerate(taps)]
    added = None if offset is None else bands.pick(share_filters(offset, share), bands.reach)
    return sum_taps(
        x,
        lambda dy, dx, run: bands.interpolate(*tables[dy], dx * channels + run.start, len(run)),
        kernel_size,
        dilation,
        runs=cut(channels, bands.count * bands.rows * x.shape[3]),
        below=bands.below,
        offset=added and (lambda run: bands.interpolate(*added, run.start, len(run))),
    )


class _Bands:
    """The rows of x, zero-padded by ``reach`` above and below, then below to whole bands."""

    def __init__(self, x: Tensor, grid: Tensor, reach: int, align_corners: bool) -> None:
        self.reach, self.align_corners = reach, align_corners
        self.height, width = x.shape[2:]
        padded = self.height + 2 * reach
        self.rows = min(BAND, padded)
        self.count = -(-padded // self.rows)
        self.below = self.count * self.rows - padded
        pixels = torch.arange(width, device=x.device)
        self.columns = _hats(self._locate(pixels, width, grid.shape[3]), 0, grid.shape[3]).t().to(x)

    def pick(self, cells: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Pick the few rows of the grid that each band reads; row r of the result is for pixel row r - shift.

        Returns:
            The rows, (B, n, bands * few, gw), and the static weights of bands for them, (bands, rows, few).
        """
        gh = cells.shape[2]
        pixels = torch.arange(self.count * self.rows, device=cells.device) - shift
        position = self._locate(pixels, self.height, gh).view(self.count, -1)
        step = (gh - 1) / max(self.height - 1, 1) if self.align_corners else gh / self.height
        few = min(gh, int((self.rows - 1) * step) + 3)
        first = position[:, :1].floor()  # a row past the last has no weight
        chosen = (first + torch.arange(few, device=cells.device)).flatten()
        picked = _multiply(cells.transpose(2, 3), _hats(chosen, 0, gh).t().to(cells)).transpose(2, 3)
        return picked, _hats(position, first[:, :, None], few).to(cells)

    def interpolate(self, picked: Tensor, weights: Tensor, first: int, count: int) -> Tensor:
        """Return the kernels of some of the picked channels, (B, count, bands * rows, W)."""
        rows = _multiply(take(picked, 1, first, count), self.columns)
        b, width = rows.shape[0], rows.shape[3]
        few = weights.shape[2]
        kernels = torch.bmm(weights.repeat(b * count, 1, 1), rows.reshape(b * count * self.count, few, width))
        return kernels.reshape(b, count, self.count * self.rows, width)

    def _locate(self, pixel: Tensor, size: int, cells: int) -> Tensor:
        """Return the positions of pixels among the cells, clamped to the first and last cell, in float64."""
        if self.align_corners:
            position = pixel.double() * ((cells - 1) / max(size - 1, 1))
        else:
            position = (pixel.double() + 0.5) * (cells / size) - 0.5
        return position.clamp(0, cells - 1)


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the last axis of (B, C, h, n) by (n, w), by ``mm``: a linear layer would be quantized."""
    return torch.mm(x.reshape(-1, x.shape[3]), matrix).reshape(*x.shape[:3], matrix.shape[1])


def _hats(position: Tensor, first: Tensor | int, cells: int) -> Tensor:
    """Weigh the cells ``first``, ``first + 1``, ... at positions (...): a matrix (..., cells)."""
    cell = first + torch.arange(cells, device=position.device)
    return (1 - (position[..., None] - cell).abs()).clamp(min=0)


def share_filters(cells: Tensor, share: int) -> Tensor:
    """Give each of ``share`` consecutive channels its filter's cells: (B, n * F, ...) to (B, n * C, ...)."""
    if share == 1:
        return cells
    b, filters, gh, gw = cells.shape
    return cells.unsqueeze(2).expand(b, filters, share, gh, gw).reshape(b, filters * share, gh, gw)
