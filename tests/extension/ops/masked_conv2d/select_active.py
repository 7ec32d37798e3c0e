"""A form of ``masked_conv2d`` that selects active positions: an infinite value elsewhere leaves no NaN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops import Form
from edgedyn.ops.masked_conv2d.forms import ACTIVATIONS


def select_active(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve everywhere, and take zero where the mask is 0."""
    y = ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation, groups))
    return torch.where(mask > 0, y, torch.zeros_like(y))


FORM = Form("select_active", select_active, frozenset({"select"}))
