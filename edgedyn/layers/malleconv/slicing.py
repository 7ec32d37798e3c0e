"""Slicing of MalleConv's grids, and filtering with the sliced kernels.

    y[b, c, p] = sum_t Resize(grid)[b, t, c, p] * x[b, c, stride * p + off(t)]  (+ Resize(bias)[b, c, p])

Resize: bilinear to the size of y, half-pixel centres, clamped at the border.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops.sliced_depthwise2d import sliced_depthwise2d

Sides = int | tuple[int, int]


class Geometry(NamedTuple):
    """The options of a convolution, (height, width) each, in the order of ``F.unfold``."""

    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def of(cls, kernel_size: Sides, dilation: Sides, stride: Sides, padding: Sides | None) -> Geometry:
        """Complete the options; the default padding keeps the size at stride 1."""
        (kh, kw), (dh, dw) = _pair(kernel_size), _pair(dilation)
        default = (dh * (kh // 2), dw * (kw // 2))
        return cls((kh, kw), (dh, dw), default if padding is None else _pair(padding), _pair(stride))

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """Return height and width of the output for features (B, C, H, W)."""
        sizes = zip(x.shape[2:], *self, strict=True)
        h, w = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in sizes)
        return h, w


def _pair(sides: Sides) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def filter_sliced(x: Tensor, grid: Tensor, offset: Tensor | None, geometry: Geometry) -> Tensor:
    """Compute ``slice_and_convolve`` on ``edgedyn::sliced_depthwise2d``, with a tap-major grid.

    A stride or an uneven kernel is the op with one tap, R = 1: the taps of x at the output's resolution stand
    side by side as T * C channels, which a tap-major grid filters as they are; their sum over taps follows.

    Args:
        x: features (B, C, H, W).
        grid: kernels (B, T * F, gh, gw).
        offset: (B, F, gh, gw) or None.
        geometry: of the convolution.
    """
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = geometry
    if geometry == Geometry.of(kh, dh, 1, None) and kh % 2:
        return sliced_depthwise2d(x, grid, offset, kh, dh)
    (h, w), taps, filters = geometry.output_size(x), kh * kw, grid.shape[1] // (kh * kw)
    padded = F.pad(x, (pw, pw, ph, ph))
    rows, columns = (h - 1) * sh + 1, (w - 1) * sw + 1
    shifted = [
        padded[:, :, dh * i : dh * i + rows : sh, dw * j : dw * j + columns : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    offsets = None if offset is None else F.pad(offset, (0, 0, 0, 0, 0, (taps - 1) * filters))
    terms = sliced_depthwise2d(torch.cat(shifted, dim=1), grid, offsets, 1)
    first, *others = torch.split(terms, x.shape[1], dim=1)
    for term in others:
        first = first + term
    return first


def resize_grid(grid: Tensor, height: int, width: int, *, align_corners: bool = False) -> Tensor:
    """Upsample a grid (B, n, gh, gw) bilinearly to (B, n, height, width)."""
    return F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=align_corners)


def slice_and_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Sides = 3,
    dilation: Sides = 1,
    stride: Sides = 1,
    padding: Sides | None = None,
) -> Tensor:
    """Filter every pixel with the bilinearly upsampled kernel at that pixel (arXiv 2201.00392, eq. 3).

    Args:
        x: features (B, C, H, W), zero-padded.
        weight: kernels (B, C / share, T, gh, gw), taps row-major; ``share`` consecutive channels use one
            filter.
        bias: offsets (B, C / share, gh, gw) or None.
        kernel_size: sides of the kernel, T is their product; each option is a number or (height, width).
        dilation: distance between taps, pixels.
        stride: distance between filtered pixels; kernels are resized to the output.
        padding: zeros around x; by default those of an output of ceil(H / stride).

    Returns:
        (B, C, H', W') for the sizes of a convolution with these options.
    """
    b, c = x.shape[:2]
    filters, taps = weight.shape[1], weight.shape[2]
    geometry = Geometry.of(kernel_size, dilation, stride, padding)
    h, w = geometry.output_size(x)
    patches = F.unfold(x, *geometry).view(b, c, taps, h, w)
    kernels = resize_grid(weight.flatten(1, 2), h, w).view(b, filters, taps, h, w)
    y = (patches * kernels.repeat_interleave(c // filters, dim=1)).sum(2)
    return y if bias is None else y + resize_grid(bias, h, w).repeat_interleave(c // filters, dim=1)


def depth_weights(guide: Tensor, depth: int) -> Tensor:
    """Weigh the cells of a bilateral grid's depth axis by a guide (HDRNet, arXiv 1707.02880, eq. 5).

    Args:
        guide: values in [0, 1], shape (B, n, H, W).
        depth: number D of cells along the depth axis.

    Returns:
        (B, D, n, H, W), summing to 1 over D; all ones at D = 1, where the guide has no effect.
    """
    position = (guide * depth).clamp(0.5, depth - 0.5).unsqueeze(1)
    centres = torch.arange(depth, dtype=guide.dtype, device=guide.device).view(1, depth, 1, 1, 1) + 0.5
    return (1 - (position - centres).abs()).clamp(min=0)


def bilateral_slice(grid: Tensor, guide: Tensor) -> Tensor:
    """Slice a bilateral grid (B, D, n, gh, gw) with a guide (B, 1 or n, H, W) in [0, 1] to (B, n, H, W)."""
    b, depth, n, gh, gw = grid.shape
    h, w = guide.shape[2:]
    cells = resize_grid(grid.reshape(b, depth * n, gh, gw), h, w).view(b, depth, n, h, w)
    return (depth_weights(guide, depth) * cells).sum(1)


def bilateral_slice_apply(grid: Tensor, guide: Tensor, image: Tensor, *, has_offset: bool) -> Tensor:
    """Apply the sliced per-pixel matrix of a bilateral grid to an image (HDRNet, arXiv 1707.02880).

    Args:
        grid: (B, D, O * (I + has_offset), gh, gw); coefficient index ``o * (I + has_offset) + i``, offset
            last.
        guide: (B, 1, H, W) in [0, 1].
        image: (B, I, H, W).
        has_offset: whether each output channel carries an additive coefficient.

    Returns:
        (B, O, H, W).
    """
    b, i, h, w = image.shape
    columns = i + has_offset
    matrix = bilateral_slice(grid, guide).view(b, -1, columns, h, w)
    y = (matrix[:, :, :i] * image.unsqueeze(1)).sum(2)
    return y + matrix[:, :, i] if has_offset else y
