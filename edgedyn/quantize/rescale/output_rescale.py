"""Channels of what a layer writes, brought to one range and taken back by a product where it is float again.

    w_c x + b_c -> Q -> DQ                               one step, set by the largest channel
    s_c w_c x + s_c b_c -> Q -> DQ -> times 1 / s_c      every channel uses all of the steps

The exact rewrite of ``equalize.py`` where no second convolution takes the factors back: in front of a PReLU
and a residual sum, or of a generated kernel's taps. It costs one float product a map.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from edgedyn.graph.nodes import (
    MULTIPLY_ADD_OPS,
    RELUS,
    bias_of,
    by_output,
    channel_axis,
    set_constant,
    weight_of,
)
from edgedyn.ops import is_ours
from edgedyn.quantize.accounting import KEPT_PRODUCT, moves_only
from edgedyn.quantize.plan import QuantizableLayer, find_quantizable_layers

RESCALE = "product"  # in a node's meta: what it does to the size of channels, and for whom
PADS = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}
_LARGEST = 32.0  # a channel that is hardly ever used
_WORTH = 0.5  # of the power of the rounding error, averaged over channels, or less must be left


def find_scalable(module: fx.GraphModule, taken_back: Collection[fx.Node]) -> list[QuantizableLayer]:
    """Return the layers whose channels can be scaled and taken back by a product.

    Not those of a single position: a few values do not tell how far a channel goes, and scaled it has no
    room.

    Args:
        module: a folded program.
        taken_back: layers whose channels somebody else takes back.
    """
    sites = [
        site for site in find_quantizable_layers(module) if site.node not in taken_back and can_scale(site)
    ]
    written = {site: site.output_node.meta["val"] for site in sites}
    return [site for site, y in written.items() if y.numel() > y.shape[channel_axis(y)]]


def scale_outputs(
    module: fx.GraphModule, sites: Sequence[QuantizableLayer], largest: Mapping[fx.Node, Tensor]
) -> dict[str, Tensor]:
    """Scale what layers write for float operators, where that pays; return the products by name.

    Args:
        module: a folded float program; changed in place, exactly but for one float32 rounding a weight.
        sites: the layers, from ``find_scalable``.
        largest: absolute value of each channel of what they write, from ``channel_maxima``.
    """
    factors = {}
    for site in sites:
        top = largest[site.output_node].max()
        up = top / largest[site.output_node].clamp(min=top / _LARGEST)
        if top > 0 and float((1 / up**2).mean()) <= _WORTH:
            factors[site.output] = scale_channels(module, site, up)
    insert_output_rescales(module, factors)
    return factors


def can_scale(site: QuantizableLayer) -> bool:
    """Whether the channels that a layer writes can be scaled in it and taken back where they are float."""
    return not _meets_layer(site.output_node) and (
        site.output_node is site.node or site.output_node.target in RELUS
    )


def _meets_layer(node: fx.Node) -> bool:
    """Whether a layer or a kernel of ours filters a map, padded or moved as it may be: it is INT8 there."""
    return any(
        user.target in MULTIPLY_ADD_OPS
        or (is_ours(user) and user.args[0] is node)
        or ((moves_only(user) or user.target in PADS) and _meets_layer(user))
        for user in node.users
    )


def scale_channels(module: fx.GraphModule, site: QuantizableLayer, up: Tensor) -> Tensor:
    """Multiply what a layer writes by a factor a channel; return the product that takes it back."""
    weight, bias = weight_of(module, site.node), bias_of(module, site.node)
    set_constant(module, site.node, 1, weight * by_output(up, weight))
    if bias is not None:
        set_constant(module, site.node, 2, bias * up)
    return 1 / up


def insert_output_rescales(module: fx.GraphModule, factors: Mapping[str, Tensor]) -> None:
    """Multiply what layers write, by name, with a factor a channel: what reads it finds its own size."""
    for site in find_quantizable_layers(module):
        if site.output not in factors:
            continue
        insert_product(
            module, site.output_node, factors[site.output], list(site.output_node.users), KEPT_PRODUCT
        )
    module.recompile()


def insert_product(
    module: fx.GraphModule, x: fx.Node, factors: Tensor, readers: Sequence[fx.Node], reason: str
) -> None:
    """Multiply a map with a factor a channel for some of its readers; the module has to be recompiled.

    Args:
        module: changed in place.
        x: the map.
        factors: (C,).
        readers: of the map, that read the product from now on.
        reason: why that is there, for the account of what is float.
    """
    value = x.meta["val"]
    axis = channel_axis(value)
    column = factors.reshape([-1 if k == axis else 1 for k in range(value.dim())])
    name = f"{x.name}_product"
    module.register_parameter(name, nn.Parameter(column.clone(), requires_grad=False))
    with module.graph.inserting_after(x):
        constant = module.graph.get_attr(name)
    constant.meta = {"val": column}
    with module.graph.inserting_after(constant):
        product = module.graph.call_function(torch.ops.aten.mul.Tensor, (x, constant))
    product.meta = {**x.meta, RESCALE: reason}
    for reader in readers:
        reader.replace_input_with(x, product)
