"""Forms of ``masked_conv2d``: how a runtime computes it without, or with, a kernel of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    the speed of a static convolution, and it saves nothing.
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](y) * mask


def onnx_node(
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
    """Keep the op as the ONNX node ``edgedyn::MaskedConv2d``, for a runtime that has our plugin.

    Inputs x, weight, mask and, where there is one, bias: an optional input stands last. ``plugin_version``
    and ``plugin_namespace`` are what TensorRT's parser looks a plugin up by.
    """
    inputs = (x, weight, mask) if bias is None else (x, weight, mask, bias)
    attributes: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "plugin_version": "1",
        "plugin_namespace": "edgedyn",
    }
    shape = (x.shape[0], weight.shape[0], *mask.shape[2:])
    return torch.onnx.ops.symbolic(
        "edgedyn::MaskedConv2d", inputs, attributes, dtype=x.dtype, shape=shape, version=1
    )


FORMS = (
    FUSED,
    Form("dense_times_mask", dense_times_mask),
    Form("onnx_node", onnx_node, requires=frozenset({"edgedyn_plugins"}), expand="after_quantize"),
)
