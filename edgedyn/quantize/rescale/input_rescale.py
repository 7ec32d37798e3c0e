"""Channels of what a layer reads, brought to one range by a product in front of it; its weight takes it back.

    x -> Q -> DQ -> conv(w)                           one step, set by the largest channel
    x -> times s_c -> Q -> DQ -> conv(w_c / s_c)      every channel uses all of the steps
    s_c = max |x| / max |x_c|

The exact rewrite of ``equalize.py`` where float operators write the map, and no layer can take the factors:
behind a residual sum, or a ReLU6 and a mask, which are not homogeneous. It costs one float product a map.
Xiao et al. 2023 (SmoothQuant) scale so where a norm takes the factors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import by_input, channel_axis, constant_of, set_constant, weight_of
from edgedyn.quantize.accounting import KEPT_INPUT_PRODUCT, moves_only
from edgedyn.quantize.deciding import find_deciding_layers
from edgedyn.quantize.plan import QuantizableLayer, find_quantizable_layers
from edgedyn.quantize.rescale.output_rescale import PADS, RESCALE, insert_product

_LARGEST = 32.0  # a channel that is hardly ever used
_WORTH = 0.2  # of the power of the error that rounding makes in the layers, or less must be left

Read = dict[str, tuple[fx.Node, list[QuantizableLayer]]]


def find_read(module: fx.GraphModule, equalized: Collection[fx.Node] = ()) -> Read:
    """Return the maps whose channels can be scaled for the layers that read them: (map, layers) by name.

    Not what a layer writes, which may stay INT8 in between; not for layers that decide; not single positions,
    which do not tell how far a channel goes.

    Args:
        module: a folded program.
        equalized: maps whose channels have one range already.
    """
    sites = find_quantizable_layers(module)
    deciding = set(find_deciding_layers(module))
    written = {site.output_node for site in sites} | set(equalized)
    readers: dict[fx.Node, list[QuantizableLayer]] = {}
    for site in sites:
        x = site.node.args[0]
        assert isinstance(x, fx.Node)
        if site.node not in deciding and _origin(x) not in written and _has_positions(site, x):
            readers.setdefault(x, []).append(site)
    return {f"{sites[0].name}.input": (x, sites) for x, sites in readers.items()}


def scale_inputs(module: fx.GraphModule, read: Read, largest: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
    """Scale what layers read of float operators, where that pays; return the factors by name.

    Args:
        module: a folded float program; changed in place, exactly but for one float32 rounding a weight.
        read: the maps, from ``find_read``.
        largest: absolute value of each channel of them, from ``channel_maxima``.
    """
    factors = {}
    for name, (x, sites) in read.items():
        top = largest[x].max()
        up = top / largest[x].clamp(min=top / _LARGEST)
        power = torch.stack([_power(module, site, len(up)) for site in sites]).sum(0)
        if top > 0 and float((power / up**2).sum()) <= _WORTH * float(power.sum()):
            factors[name] = up
            _insert(module, x, sites, up)
            for site in sites:
                _scale(module, site.node, 1 / up)
    module.recompile()
    return factors


def insert_input_rescales(module: fx.GraphModule, factors: Mapping[str, Tensor]) -> None:
    """Multiply what layers read, by name, with a factor a channel; their weights are not touched."""
    for name, (x, sites) in (find_read(module) if factors else {}).items():
        if name in factors:
            _insert(module, x, sites, factors[name])
    module.recompile()


def drop_input_rescales(module: fx.GraphModule, int8: Collection[fx.Node]) -> None:
    """Take products away that no INT8 layer reads, and the factors out of the weights behind them."""
    products = [node for node in module.graph.nodes if node.meta.get(RESCALE) == KEPT_INPUT_PRODUCT]
    for product in products:
        if not any(reader in int8 for reader in product.users):
            factors = constant_of(module, product.args[1]).flatten()
            for reader in list(product.users):
                _scale(module, reader, factors)
            product.replace_all_uses_with(product.args[0])
            module.graph.erase_node(product)
    module.recompile()


def _insert(module: fx.GraphModule, x: fx.Node, sites: Sequence[QuantizableLayer], factors: Tensor) -> None:
    insert_product(module, x, factors, [site.node for site in sites], KEPT_INPUT_PRODUCT)


def _scale(module: fx.GraphModule, layer: fx.Node, factors: Tensor) -> None:
    """Multiply the weight of a layer by a factor an input channel."""
    weight = weight_of(module, layer)
    set_constant(module, layer, 1, weight * by_input(factors, weight))


def _power(module: fx.GraphModule, site: QuantizableLayer, channels: int) -> Tensor:
    """Return the sum of the squared weights that meet each input channel, (C,)."""
    weight = weight_of(module, site.node)
    groups = channels // weight.shape[1]
    return weight.square().reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).sum((1, 3)).flatten()


def _has_positions(site: QuantizableLayer, x: fx.Node) -> bool:
    """Whether a map has several positions, and its channels where ``channel_axis`` says."""
    value = x.meta["val"]
    axis = 1 if site.node.target is not torch.ops.aten.linear.default else value.dim() - 1
    return axis == channel_axis(value) and value.numel() > value.shape[axis]


def _origin(x: fx.Node) -> fx.Node:
    """Return what wrote the values of a map that may have been moved or padded since."""
    while x.all_input_nodes and (moves_only(x) or x.target in PADS):
        x = x.all_input_nodes[0]
    return x
