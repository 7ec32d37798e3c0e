"""Channel equalization: one convolution scales the channels of a feature map, the next scales them back.

    p_c = w_c x + b_c,  y_c = f(p_c),  z = sum_c v_c y_c      with f(s p) = s f(p)
    w_c, b_c -> s_c w_c, s_c b_c;  v_c -> v_c / s_c
    1 / s_c = max(max |p_c| / max |p|, max |y_c| / max |y|)

This is the cross-layer equalization of Nagel et al. 2019 ("Data-free quantization through weight equalization
and bias correction"), but for measured ranges of activations instead of ranges of weights: each row w_c has
its own scale anyway, and reconstruction recovers the rounding error of the columns v_c.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edgedyn.graph.constants import set_constant
from edgedyn.graph.nodes import (
    RELUS,
    bias_of,
    by_input,
    by_output,
    convolution_arguments,
    fused_activation,
    is_quantizable,
    weight_of,
)
from edgedyn.graph.stages import Stage
from edgedyn.quantize.rescale.place import Place, RescalePass, Scope, always, rounding_error

_LIMIT = 32.0
_HOMOGENEOUS = RELUS | {torch.ops.aten.prelu.default, torch.ops.aten.leaky_relu.default}


def find_pairs(module: fx.GraphModule, scope: Scope) -> list[Place]:
    """Return every pair of convolutions with nothing but an activation function between them.

    The activations of a place are those that may be INT8: the output of the first convolution and the input
    of the second. Where the second is dense, the recipe limits the factors: all inputs of one of its output
    channels share one weight scale. Inside a block that a kernel computes, a mask may stand between them.
    """
    pairs = []
    stages = {stage.conv: stage for block in scope.blocks for stage in block.stages}
    for first in filter(_is_convolution, module.graph.nodes):
        activations = _activations(first, stages.get(first))
        between = activations[-1]
        second = next(iter(between.users)) if len(between.users) == 1 else None
        if second is None or not _is_convolution(second) or second.args[0] is not between:
            continue
        groups = convolution_arguments(second)[3]
        if groups in (1, between.meta["val"].shape[1]):  # dense, or depthwise
            limit = _LIMIT if groups > 1 else scope.section.equalize_dense
            pairs.append(Place(activations, (first, second), limit))
    return pairs


def _activations(first: fx.Node, stage: Stage | None) -> tuple[fx.Node, ...]:
    """Return the output of a convolution that may be INT8, and its value behind a homogeneous activation."""
    if stage is not None:
        return (stage.end,) if stage.activation in ("none", "relu", "prelu") else (first,)
    reader = next(iter(first.users)) if len(first.users) == 1 else None
    between = reader if reader is not None and reader.target in _HOMOGENEOUS else first
    return fused_activation(first) or first, between


def scale_pair(module: fx.GraphModule, place: Place, factors: Tensor) -> None:
    """Multiply the output channels of the first convolution; divide the input channels of the second."""
    first, second = place.layers
    weight = weight_of(module, first)
    set_constant(module, first, 1, weight * by_output(factors, weight))
    bias = bias_of(module, first)
    if bias is not None:
        set_constant(module, first, 2, bias * factors)
    weight = weight_of(module, second)
    set_constant(module, second, 1, weight / by_input(factors, weight))


def _error(module: fx.GraphModule, place: Place, factors: Tensor, largest: Tensor) -> float:
    return rounding_error(weight_of(module, place.layers[1]), factors, largest)


EQUALIZE = RescalePass(
    "equalize", lambda section: section.equalize, find_pairs, always, scale_pair, error=_error
)


def _is_convolution(node: fx.Node) -> bool:
    return is_quantizable(node) and node.target is not torch.ops.aten.linear.default
