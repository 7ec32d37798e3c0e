"""Channel equalization: the channels of a feature map are scaled to one range, and back by the next layer.

    p_c = w_c x + b_c,  y_c = f(p_c),  z = sum_c v_c y_c      with f(s p) = s f(p)
    w_c, b_c -> s_c w_c, s_c b_c;  v_c -> v_c / s_c
    1 / s_c = max(max |p_c| / max |p|, max |y_c| / max |y|)

A tensor has one INT8 step, set by its largest channel; here every channel uses all of the steps. That is the
cross-layer equalization of Nagel et al. 2019 ("Data-free quantization through weight equalization and bias
correction") with measured ranges of activations in place of those of weights: the rows w_c have a scale
each, and what the columns v_c lose, reconstruction of their rounding brings back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import (
    MULTIPLY_ADD_OPS,
    RELUS,
    bias_of,
    by_input,
    by_output,
    fused_activation,
    set_constant,
    weight_of,
)
from edgedyn.graph.rewrites import convolution_arguments

_LARGEST = 32.0  # a channel that is hardly ever used keeps some of its steps
_HOMOGENEOUS = RELUS | {torch.ops.aten.prelu.default, torch.ops.aten.leaky_relu.default}


@dataclass(frozen=True)
class Pair:
    """Two convolutions with nothing but an activation between them, which nobody else reads.

    Attributes:
        first: the convolution that writes the map.
        between: the map that is scaled: what ``second`` reads.
        second: the convolution that reads it.
    """

    first: fx.Node
    between: fx.Node
    second: fx.Node

    @property
    def maps(self) -> tuple[fx.Node, fx.Node]:
        """Return what may have an INT8 step: what ``first`` writes, and what ``second`` reads."""
        return fused_activation(self.first) or self.first, self.between


def find_pairs(module: fx.GraphModule) -> list[Pair]:
    """Return every pair of convolutions that can be equalized exactly."""
    pairs = []
    for first in module.graph.nodes:
        if not _is_convolution(first) or len(first.users) != 1:
            continue
        between = next(iter(first.users))
        between = between if between.target in _HOMOGENEOUS else first
        second = next(iter(between.users)) if len(between.users) == 1 else None
        if second is None or not _is_convolution(second) or second.args[0] is not between:
            continue
        if convolution_arguments(second)[3] in (1, between.meta["val"].shape[1]):  # dense, or depthwise
            pairs.append(Pair(first, between, second))
    return pairs


def equalize(
    module: fx.GraphModule,
    pairs: Sequence[Pair],
    largest: Mapping[fx.Node, Tensor],
    *,
    most_dense: float = _LARGEST,
) -> list[fx.Node]:
    """Scale the channels between pairs of convolutions; return the convolutions that were changed.

    Exact but for one float32 rounding a weight. A map of zeros has no range, and its pair stays.

    Args:
        module: a folded program; changed in place.
        pairs: of its convolutions.
        largest: absolute value of each channel of the maps of the pairs, from ``channel_maxima``.
        most_dense: how many times a channel may be widened that a dense layer takes back: there all inputs of
            an output channel share one step.
    """
    scaled = [pair for pair in pairs if largest[pair.between].any()]
    for pair in scaled:
        shares = [largest[node] / largest[node].max() for node in pair.maps]
        _scale(module, pair, torch.stack(shares).amax(0), most_dense)
    module.recompile()
    return list(dict.fromkeys(node for pair in scaled for node in (pair.first, pair.second)))


def _scale(module: fx.GraphModule, pair: Pair, largest: Tensor, most_dense: float) -> None:
    top = largest.max()
    is_depthwise = convolution_arguments(pair.second)[3] > 1
    factor = top / largest.clamp(min=top / (_LARGEST if is_depthwise else most_dense))
    weight = weight_of(module, pair.first)
    set_constant(module, pair.first, 1, weight * by_output(factor, weight))
    bias = bias_of(module, pair.first)
    if bias is not None:
        set_constant(module, pair.first, 2, bias * factor)
    weight = weight_of(module, pair.second)
    set_constant(module, pair.second, 1, weight / by_input(factor, weight))


def _is_convolution(node: fx.Node) -> bool:
    return node.target in MULTIPLY_ADD_OPS and node.target is not torch.ops.aten.linear.default
