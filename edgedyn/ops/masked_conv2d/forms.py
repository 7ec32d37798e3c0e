"""Forms of ``masked_conv2d``, with a kernel of ours or of ordinary operators."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops import FUSED, Form

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
}


def dense_times_mask(
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
    """Convolve everywhere, activate, and multiply by the mask.

    Exact: a position's result depends on no other position, and the mask is 0 or 1. Every runtime runs it at
    the speed of a static convolution: nothing is saved.
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](y) * mask


FORMS = (
    FUSED,
    Form("dense_times_mask", dense_times_mask),
)
