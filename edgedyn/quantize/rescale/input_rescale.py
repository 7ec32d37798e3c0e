"""Input rescale: a Mul in front of layers scales their input channels to one range; their weights undo it.

    x -> Q -> DQ -> conv(w)                      one scale, set by the largest channel
    x -> Mul s_c -> Q -> DQ -> conv(w_c / s_c)   every channel uses all 256 values

The exact rewrite of ``equalize.py`` where float operators write the activation and no layer can take the
factors: behind a residual sum, or behind a ReLU6 and a mask, which are not homogeneous. It costs one float
Mul per feature map. SmoothQuant (Xiao et al. 2023) scales in the same way where a norm takes the factors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from edgedyn.graph.constants import set_constant
from edgedyn.graph.nodes import by_input, channel_axis, constant_of, weight_of
from edgedyn.quantize.accounting import KEPT_INPUT_RESCALE, moves_only
from edgedyn.quantize.deciding import find_deciding_layers
from edgedyn.quantize.plan import QuantizableLayer, find_quantizable_layers
from edgedyn.quantize.rescale.output_rescale import PADS, RESCALE, insert_rescale
from edgedyn.quantize.rescale.place import Place, RescalePass, Scope, rounding_error

_LIMIT = 32.0
_WORTH = 0.2  # share of the power of the layers' rounding error that may be left


def find_inputs(module: fx.GraphModule, scope: Scope) -> list[Place]:
    """Return the activations of float operators whose channels can be scaled for the layers that read them.

    Outputs of layers are left alone, because they may stay INT8 in between; so are inputs of layers that
    decide, and inputs of a single position, which do not show the range of a channel.
    """
    return _find(module, scope.taken)


def _find(module: fx.GraphModule, taken: Collection[fx.Node] = ()) -> list[Place]:
    layers = find_quantizable_layers(module)
    deciding = set(find_deciding_layers(module))
    written = {layer.output_node for layer in layers} | set(taken)
    readers: dict[fx.Node, list[QuantizableLayer]] = {}
    for layer in layers:
        x = layer.input_node
        if layer.node not in deciding and _origin(x) not in written and _has_positions(layer, x):
            readers.setdefault(x, []).append(layer)
    return [
        Place((x,), tuple(layer.node for layer in found), _LIMIT, f"{found[0].name}.input")
        for x, found in readers.items()
    ]


def lowers_error(module: fx.GraphModule, place: Place, factors: Tensor) -> bool:
    """Whether at most a fifth of the rounding error's power is left in the outputs of the layers."""
    power = torch.stack([_power(module, layer, len(factors)) for layer in place.layers]).sum(0)
    return float((power / factors**2).sum()) <= _WORTH * float(power.sum())


def scale_input(module: fx.GraphModule, place: Place, factors: Tensor) -> Tensor:
    """Insert the Mul in front of the layers and divide their weights by its factors; return these."""
    insert_rescale(module, place.activations[0], factors, place.layers, KEPT_INPUT_RESCALE)
    for layer in place.layers:
        _scale(module, layer, 1 / factors)
    return factors


def _error(module: fx.GraphModule, place: Place, factors: Tensor, largest: Tensor) -> float:
    return sum(rounding_error(weight_of(module, layer), factors, largest) for layer in place.layers)


RESCALE_INPUTS = RescalePass(
    "rescale_inputs",
    lambda section: section.equalize_inputs,
    find_inputs,
    lowers_error,
    scale_input,
    error=_error,
    mends_outliers=True,
)


def insert_input_rescales(module: fx.GraphModule, factors: Mapping[str, Tensor]) -> None:
    """Insert a per-channel Mul in front of the layers that read each named input.

    Their weights are not touched: a calibration table has them scaled already.

    Args:
        module: a folded program; changed in place.
        factors: of Muls, (C,), by name of an activation; those of outputs are ignored.
    """
    for place in _find(module) if factors else ():
        if place.tensor in factors:
            insert_rescale(
                module, place.activations[0], factors[place.tensor], place.layers, KEPT_INPUT_RESCALE
            )
    module.recompile()


def drop_input_rescales(module: fx.GraphModule, int8: Collection[fx.Node]) -> None:
    """Remove the Muls in front of layers that stay float, and the factors from their weights.

    Args:
        module: a folded program; changed in place.
        int8: calls of the INT8 layers. A Mul that one of them reads stays.
    """
    rescales = [node for node in module.graph.nodes if node.meta.get(RESCALE) == KEPT_INPUT_RESCALE]
    for rescale in rescales:
        if not any(reader in int8 for reader in rescale.users):
            factors = constant_of(module, rescale.args[1]).flatten()
            for reader in list(rescale.users):
                _scale(module, reader, factors)
            rescale.replace_all_uses_with(rescale.args[0])
            module.graph.erase_node(rescale)
    module.recompile()


def _scale(module: fx.GraphModule, layer: fx.Node, factors: Tensor) -> None:
    """Multiply the weight of a layer by one factor per input channel."""
    weight = weight_of(module, layer)
    set_constant(module, layer, 1, weight * by_input(factors, weight))


def _power(module: fx.GraphModule, layer: fx.Node, channels: int) -> Tensor:
    """Return the sum of the squared weights that meet each input channel, (C,)."""
    weight = weight_of(module, layer)
    groups = channels // weight.shape[1]
    return weight.square().reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).sum((1, 3)).flatten()


def _has_positions(layer: QuantizableLayer, x: fx.Node) -> bool:
    """Whether an activation has several positions, and its channels on the axis of ``channel_axis``."""
    value = x.meta["val"]
    axis = 1 if layer.node.target is not torch.ops.aten.linear.default else value.dim() - 1
    return axis == channel_axis(value) and value.numel() > value.shape[axis]


def _origin(x: fx.Node) -> fx.Node:
    """Return the node that computed an activation, which may have been moved or padded since."""
    while x.all_input_nodes and (moves_only(x) or x.target in PADS):
        x = x.all_input_nodes[0]
    return x
