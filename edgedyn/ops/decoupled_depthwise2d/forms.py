"""Forms of ``decoupled_depthwise2d``, with a kernel of ours or of ordinary operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops import FUSED, Form
from edgedyn.ops.shifting import cut, sum_taps, take


def shift_mac(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
) -> Tensor:
    """Shift x by one tap at a time, combine that tap of both filters, multiply and add.

    Exact: the sum over taps is the definition; it holds the kernels of one tap at a time. Only static pads,
    slices, resizes, mul, add and concatenations, in 4 axes, which every runtime has. An added kernel could be
    split, ``(ch + sp) * x = ch * x + sp * x``, which is slower: 42 against 30 ms (the shortest of 25 runs,
    C=32, 256 x 256, R=3, ExecuTorch 1.5.1 with XNNPACK, 2 x86 threads, both timed in turns).
    """
    channels = x.shape[1]
    runs = 1 if heads == channels else heads  # with one head per channel, taps combine element by element
    share, width = channels // runs, heads // runs
    parts = []
    for run in range(runs):
        part = x if runs == 1 else x[:, run * share : (run + 1) * share]
        y = None
        for tap, shifted in enumerate(_shift(part, spatial_filter, kernel_size, stride, dilation)):
            first = tap * channels + run * share
            channel = channel_filter[:, first : first + share]
            spatial = spatial_filter[:, tap * heads + run : tap * heads + run + width]
            kernel = channel * spatial if combine == "mul" else channel + spatial
            y = kernel * shifted if y is None else y + kernel * shifted
        assert y is not None  # kernel_size >= 1 is checked by the op
        parts.append(y)
    return parts[0] if runs == 1 else torch.cat(parts, dim=1)


def _shift(x: Tensor, spatial_filter: Tensor, kernel_size: int, stride: int, dilation: int) -> list[Tensor]:
    """Return the input of each tap, (B, C, h, w): a window of the padded x, or of one of its phases.

    Phase (i, j) holds the rows i, i + stride, ... and the columns j, j + stride, ...; the taps of one phase
    share it, and a tap is a window of step 1. The taps of one kernel row share its rows of the phase.
    """
    h, w = spatial_filter.shape[2:]
    padding = dilation * (kernel_size // 2)
    padded = F.pad(x, (padding,) * 4) if padding else x
    offsets = [(dilation * (t // kernel_size), dilation * (t % kernel_size)) for t in range(kernel_size**2)]
    phases: dict[tuple[int, int], Tensor] = {}
    rows: dict[tuple[int, int], Tensor] = {}
    shifted = []
    for dy, dx in offsets:
        key = dy % stride, dx % stride
        if key not in phases:
            far_y = max(y for y, _ in offsets if y % stride == key[0]) // stride
            far_x = max(x for _, x in offsets if x % stride == key[1]) // stride
            phases[key] = _subsample(padded, key, (h + far_y, w + far_x), stride)
        if (dy, key[1]) not in rows:
            rows[dy, key[1]] = take(phases[key], 2, dy // stride, h)
        shifted.append(take(rows[dy, key[1]], 3, dx // stride, w))
    return shifted


def _subsample(x: Tensor, first: tuple[int, int], size: tuple[int, int], stride: int) -> Tensor:
    """Return every stride-th row and column from ``first`` on, ``size`` of them.

    XNNPACK has no slice of a step above 1, and no portable kernel may run at full resolution. A bilinear
    resize from stride * (n - 1) + 1 pixels to n with aligned corners reads pixel stride * i with weight 1.
    """
    if stride == 1:
        return x
    x = take(x, 2, first[0], stride * (size[0] - 1) + 1)
    x = take(x, 3, first[1], stride * (size[1] - 1) + 1)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def shift_sums(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
) -> Tensor:
    """Multiply x by a row of taps in place and shift the sum, one run of channels after the other.

    Exact: only the order of sums differs from the definition. The spatial filter is shifted instead of x: it
    is small, and shifted once for all channels. A strided op has no sums to share: ``shift_mac`` computes it.
    """
    if stride > 1:
        return shift_mac(x, channel_filter, spatial_filter, kernel_size, stride, dilation, heads, combine)
    channels, (height, width) = x.shape[1], x.shape[2:]
    reach = dilation * (kernel_size // 2)
    share = channels // heads
    taps = [take(spatial_filter, 1, tap * heads, heads) for tap in range(kernel_size**2)]
    shifts = [tap // kernel_size * dilation for tap in range(kernel_size**2)]
    moved = [F.pad(m, (0, 0, dy, 2 * reach - dy)) if reach else m for m, dy in zip(taps, shifts, strict=True)]

    def kernel(dy: int, dx: int, run: range) -> Tensor:
        tap = dy * kernel_size + dx
        channel = channel_filter.narrow(1, tap * channels + run.start, len(run))
        spatial = take(moved[tap], 1, run.start // share, -(-len(run) // share))
        return channel * spatial if combine == "mul" else channel + spatial

    runs = cut(channels, (height + 2 * reach) * width, within=None if share in (1, channels) else share)
    return sum_taps(x, kernel, kernel_size, dilation, runs=runs)


FORMS = (
    FUSED,
    Form("shift_sums", shift_sums, requires=frozenset({"in_order"})),
    Form("shift_mac", shift_mac),
)
