"""Forms of ``inverted_residual``, with a kernel of ours or of ordinary operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops import FUSED, Form
from edgedyn.ops.inverted_residual.block import Block


def three_convolutions(x: Tensor, *rest: Any) -> Tensor:
    """Convolve three times, each map through memory; multiply by the mask and add x.

    Exact: the mask is 0 or 1, and a position of y depends on no other one. Nothing is saved under a mask.
    """
    block = Block.read(rest[:10], rest[10:])
    weight, bias = block.depthwise.weight, block.depthwise.bias
    y = block.expand.activate(F.conv2d(x, block.expand.weight, block.expand.bias))
    filtered = F.conv2d(y, weight, bias, block.stride, weight.shape[2] // 2, groups=len(weight))
    y = block.depthwise.activate(filtered)
    y = block.project.activate(F.conv2d(y, block.project.weight, block.project.bias))
    y = y if block.mask is None else y * block.mask
    return x + y if block.residual else y


FORMS = (
    # there is no plugin for TensorRT, whose targets offer the other kernels
    replace(FUSED, requires=frozenset({"edgedyn_block_kernel"})),
    Form("three_convolutions", three_convolutions),
)
