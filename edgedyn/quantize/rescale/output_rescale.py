"""Output rescale: a layer scales its output channels to one range, and a Mul behind it scales them back.

    w_c x + b_c -> Q -> DQ                               one scale, set by the largest channel
    s_c w_c x + s_c b_c -> Q -> DQ -> Mul 1 / s_c        every channel uses all 256 values

The exact rewrite of ``equalize.py`` where no second convolution takes the factors: in front of a PReLU, a
residual sum, or an op that filters with generated kernels. It costs one float Mul per feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from edgedyn.graph.constants import add_constant, frozen, set_constant
from edgedyn.graph.nodes import RELUS, bias_of, by_output, channel_axis, is_quantizable, weight_of
from edgedyn.ops import is_ours
from edgedyn.quantize.accounting import KEPT_OUTPUT_RESCALE, moves_only
from edgedyn.quantize.plan import QuantizableLayer, find_quantizable_layers
from edgedyn.quantize.rescale.place import Place, RescalePass, Scope

RESCALE = "rescale"  # key in the meta of a rescale Mul: the reason for it, in the account of float operators
PADS = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}
_LIMIT = 32.0
_WORTH = 0.5  # share of the rounding error's power, averaged over channels, that may be left


def find_outputs(module: fx.GraphModule, scope: Scope) -> list[Place]:
    """Return the layers whose output channels a Mul can scale back, except those of generated kernels.

    An output of a single position is left alone: the samples give only a few values per channel, and a
    channel that is scaled to fill the INT8 range would clip larger ones.
    """
    places = []
    for layer in find_quantizable_layers(module):
        if layer.output in scope.generated or layer.output_node in scope.taken or not can_scale(layer):
            continue
        y = layer.output_node.meta["val"]
        if y.numel() > y.shape[channel_axis(y)]:
            places.append(Place((layer.output_node,), (layer.node,), _LIMIT, layer.output))
    return places


def halves_error(module: fx.GraphModule, place: Place, factors: Tensor) -> bool:
    """Whether the rounding error of the output loses half of its power; the Mul costs time."""
    return float((1 / factors**2).mean()) <= _WORTH


def scale_output(module: fx.GraphModule, place: Place, factors: Tensor) -> Tensor:
    """Multiply the output channels of the layer and insert the Mul that undoes it; return its factors."""
    (layer,), (output,) = place.layers, place.activations
    weight, bias = weight_of(module, layer), bias_of(module, layer)
    set_constant(module, layer, 1, weight * by_output(factors, weight))
    if bias is not None:
        set_constant(module, layer, 2, bias * factors)
    insert_rescale(module, output, 1 / factors, list(output.users), KEPT_OUTPUT_RESCALE)
    return 1 / factors


def _error(module: fx.GraphModule, place: Place, factors: Tensor, largest: Tensor) -> float:
    return float((factors * largest).max() ** 2 * (1 / factors**2).sum())


RESCALE_OUTPUTS = RescalePass(
    "rescale_outputs",
    lambda section: section.equalize_outputs,
    find_outputs,
    halves_error,
    scale_output,
    error=_error,
)


def can_scale(layer: QuantizableLayer) -> bool:
    """Whether the output channels of a layer can be scaled in its weight and back where they are float."""
    output = layer.output_node
    return not _meets_layer(output) and (output is layer.node or output.target in RELUS)


def _meets_layer(node: fx.Node) -> bool:
    """Whether a layer or an op of ours, which may be INT8, reads an activation, perhaps padded or moved."""
    return any(
        is_quantizable(user)
        or (is_ours(user) and user.args[0] is node)
        or ((moves_only(user) or user.target in PADS) and _meets_layer(user))
        for user in node.users
    )


def insert_output_rescales(module: fx.GraphModule, factors: Mapping[str, Tensor]) -> None:
    """Insert a per-channel Mul behind each named output, so that its readers see the original range.

    The weights are not touched: a calibration table has them scaled already.

    Args:
        module: a folded program; changed in place.
        factors: of Muls, (C,), by name of an activation; those of inputs are ignored.
    """
    for layer in find_quantizable_layers(module):
        if layer.output in factors:
            output = layer.output_node
            insert_rescale(module, output, factors[layer.output], list(output.users), KEPT_OUTPUT_RESCALE)
    module.recompile()


def insert_rescale(
    module: fx.GraphModule, x: fx.Node, factors: Tensor, readers: Sequence[fx.Node], reason: str
) -> None:
    """Insert a per-channel Mul between an activation and some of its readers; the caller recompiles.

    Args:
        module: changed in place.
        x: the activation.
        factors: (C,).
        readers: nodes that read the rescaled activation from now on.
        reason: why the Mul is there, for the account of float operators.
    """
    value = x.meta["val"]
    axis = channel_axis(value)
    column = factors.reshape([-1 if k == axis else 1 for k in range(value.dim())])
    constant = add_constant(module, x.next, f"{x.name}_product", frozen(column), {"val": column})
    with module.graph.inserting_after(constant):
        rescaled = module.graph.call_function(torch.ops.aten.mul.Tensor, (x, constant))
    rescaled.meta = {**x.meta, RESCALE: reason}
    for reader in readers:
        reader.replace_input_with(x, rescaled)
