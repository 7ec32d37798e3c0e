"""Exact rewrites of a captured program before it is folded and quantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch.export import ExportedProgram

from edgedyn.graph.constants import add_constant, export_again, frozen, store_constants
from edgedyn.graph.mixes import mix_outputs
from edgedyn.graph.nodes import COUNTED_OPS, argument, constant_of, shape_of, with_defaults

_ATEN = torch.ops.aten


def simplify(program: ExportedProgram) -> ExportedProgram:
    """Return a captured program with stored constants, explicit padding and static layers in place of mixes.

    All of it is exact up to the rounding of constants. A program without such parts is returned as it is.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    layers = (explicit_padding, products_as_linear, flatten_linear, mix_outputs)
    changed = [rewrite(module) for rewrite in (store_constants, drop_views, *layers)]
    if not any(changed):
        return program
    store_constants(module)  # a mix leaves reshaped biases
    return export_again(program, module)


def drop_views(module: fx.GraphModule) -> bool:
    """Remove the views of the input and output of a layer that keep the shape; return whether there were any.

    Kernels per sample are written as groups of one image, ``x.view(1, B * C, H, W)``: nothing at B = 1.
    """
    found = [
        node
        for node in module.graph.nodes
        if node.target in (_ATEN.view.default, _ATEN.reshape.default)
        and shape_of(node) == shape_of(node.args[0])
        and any(getattr(other, "target", None) in COUNTED_OPS for other in (argument(node, 0), *node.users))
    ]
    for node in found:
        node.replace_all_uses_with(argument(node, 0))
        module.graph.erase_node(node)
    module.recompile()
    return bool(found)


def explicit_padding(module: fx.GraphModule) -> bool:
    """Write the padding of convolutions as numbers: quantizers and XNNPACK know ``conv2d.default`` only.

    A convolution that pads unevenly, "same" with an even kernel, gets a pad in front; torch pads the odd row
    and column at the end.

    Returns:
        Whether there was such a convolution.
    """
    found = [node for node in module.graph.nodes if node.target is _ATEN.conv2d.padding]
    for node in found:
        x, weight, *rest = node.args
        bias, stride, padding, dilation, groups = with_defaults(rest, None, (1, 1), "valid", (1, 1), 1)
        both = [
            d * (k - 1) * (padding == "same")
            for d, k in zip((dilation[0], dilation[-1]), shape_of(weight)[2:], strict=True)
        ]
        before = [size // 2 for size in both]
        if any(size % 2 for size in both):
            (top, left), (bottom, right) = before, [size - size // 2 for size in both]
            x, before = _pad(module, node, [left, right, top, bottom]), [0, 0]
        node.target = _ATEN.conv2d.default
        node.args = (x, weight, bias, stride, before, dilation, groups)
    module.recompile()
    return bool(found)


def products_as_linear(module: fx.GraphModule) -> bool:
    """Write ``x @ weight``, x (..., T, I) and weight stored (I, O), as linear layers, which can be INT8.

    Returns:
        Whether there was such a product.
    """
    products = [node for node in module.graph.nodes if node.target is _ATEN.matmul.default]
    products = [node for node in products if argument(node, 1).op == "get_attr"]
    found = [n for n in products if len(shape_of(n.args[0])) > 2 == len(shape_of(n.args[1]))]
    for node in found:
        weight = frozen(constant_of(module, node.args[1]).t().contiguous())
        stored = add_constant(module, node, f"{node.name}_weight", weight, {**node.meta, "val": weight})
        node.target, node.args = _ATEN.linear.default, (node.args[0], stored)
    module.graph.eliminate_dead_code()
    module.recompile()
    return bool(found)


def flatten_linear(module: fx.GraphModule) -> bool:
    """Give linear layers of 4-d maps, channels last, their rows as a matrix; return whether there were any.

    Quantization takes axis 1 of a 4-d map for its channels; runtimes multiply matrices.
    """
    linear = [node for node in module.graph.nodes if node.target is _ATEN.linear.default]
    found = [node for node in linear if len(shape_of(node)) > 3]
    for node in found:
        x, value = argument(node, 0), node.meta["val"]
        with module.graph.inserting_before(node):
            rows = module.graph.call_function(_ATEN.reshape.default, (x, [-1, shape_of(x)[-1]]))
        with module.graph.inserting_after(node):
            maps = module.graph.call_function(_ATEN.reshape.default, (node, list(value.shape)))
        node.replace_all_uses_with(maps, lambda user, maps=maps: user is not maps)
        node.update_arg(0, rows)
        rows.meta = {**node.meta, "val": x.meta["val"].flatten(0, -2)}
        maps.meta = dict(node.meta)
        node.meta = {**node.meta, "val": value.flatten(0, -2)}
    module.recompile()
    return bool(found)


def _pad(module: fx.GraphModule, layer: fx.Node, sizes: list[int]) -> fx.Node:
    """Insert a zero pad of a layer's input, as a part of the layer."""
    x = argument(layer, 0)
    with module.graph.inserting_before(layer):
        pad = module.graph.call_function(_ATEN.constant_pad_nd.default, (x, sizes))
    pad.meta = {**layer.meta, "val": F.pad(x.meta["val"], sizes)}
    return pad
