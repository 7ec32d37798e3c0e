"""Every reader of a quantized map gets a dequantize of its own: XNNPACK needs it."""

from __future__ import annotations

import torch
from torch import fx


def separate_readers(module: fx.GraphModule) -> None:
    """Give every reader its own dequantize; no number changes.

    XNNPACK (executorch 1.5.1) changes the layout of a dequantize for one reader and hands the result to all
    ("Propagating input shapes failed"). It also makes a pad between a dequantize and a float reader half
    quantized ("Failed to create StaticConstantPad node"), unless a quantize follows.
    """
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(module.graph.nodes):
        if _is_zero_pad(node) and node.args[0].target is dequantize:
            _quantize_again(module, node)
    for node in [n for n in module.graph.nodes if n.target is dequantize]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for reader in node.users:
            groups.setdefault(_range_of(reader), []).append(reader)
        for readers in list(groups.values())[1:]:
            with module.graph.inserting_before(readers[0]):
                own = module.graph.node_copy(node)
            for reader in readers:
                reader.replace_input_with(node, own)
    module.recompile()


def _range_of(node: fx.Node) -> fx.Node:
    """Return the node that finds the range of what a node quantizes at run time, else the node itself."""
    if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.tensor:
        return node.args[1].args[0]  # type: ignore[union-attr, return-value]
    return node


def _quantize_again(module: fx.GraphModule, pad: fx.Node) -> None:
    """Follow a pad by a Q/DQ pair of its input's step, unless all its readers quantize.

    Exact: zero and the padded values lie on that grid.
    """
    pair = torch.ops.quantized_decomposed
    readers = [user for user in pad.users if user.target is not pair.quantize_per_tensor.default]
    if not readers:
        return
    step = pad.args[0].args[1:]  # type: ignore[union-attr]
    with module.graph.inserting_after(pad):
        quantized = module.graph.call_function(pair.quantize_per_tensor.default, (pad, *step))
    with module.graph.inserting_after(quantized):
        dequantized = module.graph.call_function(pair.dequantize_per_tensor.default, (quantized, *step))
    for node in (quantized, dequantized):
        node.meta = dict(pad.meta)
    for reader in readers:
        reader.replace_input_with(pad, dequantized)


def _is_zero_pad(node: fx.Node) -> bool:
    rest = [arg for arg in node.args[2:] if arg not in ("constant", None, 0)]
    return node.target in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default) and not rest
