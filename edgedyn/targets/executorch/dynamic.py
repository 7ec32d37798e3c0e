"""Layers that XNNPACK can run in INT8 with a range per image: float in, float out.

These are linear layers on 2-d inputs and dense convolutions (executorch 1.5.1). A convolution whose input is
not channels-last yet is excluded and keeps its calibrated range: the delegate's layout pass would change the
layout of everything back to the network's input, and the program would fail at its first run ("Propagating
input shapes failed"). For a linear layer the runtime computes one range per row, and the exported program one
range for all rows, so that the runtime is closer to float.
"""

from __future__ import annotations

import torch
from torch import fx

from edgedyn.graph.nodes import convolution_arguments

_CHANNELS_LAST = {
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.max_pool2d.default,
    torch.ops.aten.prelu.default,
    torch.ops.aten.upsample_bilinear2d.vec,
}
# these keep the layout of their inputs; a sum or product with a number does not
_KEEPS = {torch.ops.aten.cat.default, torch.ops.aten.constant_pad_nd.default}
_TERMS = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.sub.Tensor,
}


def can_be_dynamic(node: fx.Node) -> bool:
    """Whether the input range of a convolution or linear layer of a float program may be found per image."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if node.target is torch.ops.aten.linear.default:
        return len(x.meta["val"].shape) == 2
    return convolution_arguments(node)[3] == 1 and (x.op == "placeholder" or _is_channels_last(x))


def _is_channels_last(node: fx.Node) -> bool:
    """Whether the layout pass leaves an activation channels-last: a convolution's, or a join of such."""
    if node.op == "get_attr":
        return len(node.meta["val"].shape) == 4
    if node.target in _CHANNELS_LAST:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _TERMS and len(node.all_input_nodes) < 2:
        return False
    is_pointwise = torch.Tag.pointwise in node.target.tags
    return (is_pointwise or node.target in _KEEPS) and all(map(_is_channels_last, node.all_input_nodes))
