"""Which layers XNNPACK can run in INT8 with the range of each image: float in, float out.

It takes linear layers of rows, and dense convolutions (executorch 1.5.1). Where what a convolution reads is
not channels-last yet, the delegate's layout pass changes the layout of everything back to the network's
input instead, and the program dies at its first run ("Propagating input shapes failed"). So such a layer
keeps its calibrated step. Each row of a linear layer has a range of its own in the runtime, where the
program has one of all rows: the runtime is nearer to float.
"""

from __future__ import annotations

import torch
from torch import fx

from edgedyn.graph.rewrites import convolution_arguments

_CHANNELS_LAST = {
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.max_pool2d.default,
    torch.ops.aten.prelu.default,
    torch.ops.aten.upsample_bilinear2d.vec,
}
# these keep the layout of what they read; a sum or product with a number does not
_KEEPS = {torch.ops.aten.cat.default, torch.ops.aten.constant_pad_nd.default}
_TERMS = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.sub.Tensor,
}


def can_be_dynamic(node: fx.Node) -> bool:
    """Whether a convolution or linear layer of a float program may take its range from each image."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if node.target is torch.ops.aten.linear.default:
        return len(x.meta["val"].shape) == 2
    return convolution_arguments(node)[3] == 1 and (x.op == "placeholder" or _is_channels_last(x))


def _is_channels_last(node: fx.Node) -> bool:
    """Whether the layout pass leaves a map channels-last: convolutions do, and what only joins their maps."""
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
