"""Forms of ``sliced_depthwise2d``, with a kernel of ours or of ordinary operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops import FUSED, Form
from edgedyn.ops.sliced_depthwise2d.banded import banded_shift_mac, share_filters


def resize_shift_mac(
    x: Tensor,
    grid: Tensor,
    offset: Tensor | None,
    kernel_size: int,
    dilation: int = 1,
    align_corners: bool = False,
) -> Tensor:
    """Resize the grid one tap at a time, shift x by that tap, multiply and add.

    Exact: the sum over taps is the definition, in another order of loops; each tap is used once, so only one
    upsampled tap is held at a time. Only static resizes, pads, slices, mul and add,
    which every runtime has. One resize of all taps at once is slower: 142 against 104 ms (C=32, 512 x 512,
    R=3, grid 16 x 16, ExecuTorch 1.5.1 with XNNPACK, 2 x86 threads).
    """
    height, width = x.shape[2:]
    filters = grid.shape[1] // kernel_size**2
    padding = dilation * (kernel_size // 2)
    padded = F.pad(x, (padding,) * 4) if padding else x
    y = None
    for tap, cells in enumerate(torch.split(grid, filters, dim=1) if kernel_size > 1 else (grid,)):
        kernel = _upsample(cells, x, align_corners)
        dy, dx = dilation * (tap // kernel_size), dilation * (tap % kernel_size)
        term = kernel * (padded[:, :, dy : dy + height, dx : dx + width] if kernel_size > 1 else x)
        y = term if y is None else y + term
    assert y is not None  # kernel_size >= 1 is checked by the op
    return y if offset is None else y + _upsample(offset, x, align_corners)


def _upsample(cells: Tensor, x: Tensor, align_corners: bool) -> Tensor:
    """Copy each filter to its consecutive channels while the grid is still small, then resize to x."""
    shared = share_filters(cells, x.shape[1] // cells.shape[1])
    return F.interpolate(shared, size=x.shape[2:], mode="bilinear", align_corners=align_corners)


FORMS = (
    FUSED,
    Form("banded_shift_mac", banded_shift_mac, frozenset({"in_order"})),
    Form("resize_shift_mac", resize_shift_mac),
)
