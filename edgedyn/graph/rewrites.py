"""Exact rewrites of a captured program before it is folded and quantized."""

from __future__ import annotations

import torch
from torch import fx

from edgedyn.graph.nodes import shape_of, with_defaults


def explicit_padding(module: fx.GraphModule) -> None:
    """Write the padding of convolutions as numbers: quantizers and XNNPACK know ``conv2d.default`` only.

    A convolution that pads unevenly, "same" with an even kernel, stays as it is.
    """
    for node in module.graph.nodes:
        if node.target is not torch.ops.aten.conv2d.padding:
            continue
        x, weight, *rest = node.args
        bias, stride, padding, dilation, groups = with_defaults(rest, None, (1, 1), "valid", (1, 1), 1)
        sides = shape_of(weight)[2:]
        both = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, sides, strict=True)]
        if not any(size % 2 for size in both):
            node.target = torch.ops.aten.conv2d.default
            node.args = (x, weight, bias, stride, [size // 2 for size in both], dilation, groups)
    module.recompile()
