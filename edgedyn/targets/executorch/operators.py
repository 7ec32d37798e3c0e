"""Attribute each operator of a lowered program to a layer, in the order in which the runtime runs them.

    float activation -> convert -> INT8 layer -> convert -> float consumer

XNNPACK runs a quantize or dequantize node as an operator of its own, unless it stands between two INT8
operators: the partitioner tags those. The time of a conversion counts for the layers that need it: the INT8
consumers of a quantize, the INT8 producer of a dequantize. A block that one kernel of ours computes is one
layer, named by the path that its convolutions have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from executorch.backends.xnnpack.utils.quant_utils import (
    is_dequant,
    is_dynamic_qdq,
    is_per_channel,
    is_quant,
    is_tagged_as_implicit_q_dq,
)
from torch.export import ExportedProgram
from torch.fx import Node

from edgedyn.graph.nodes import module_path, multiply_adds, number_repeats, shape_of

# XNNPACK and the portable kernels run these as a convolution or a matrix product with static weights
_LAYERS = {
    "aten.convolution.default",
    "aten.linear.default",
    "aten.addmm.default",
    "aten.mm.default",
}
_BLOCKS = {
    "edgedyn.inverted_residual.default": False,
    "edgedyn.inverted_residual_int8.default": True,
}  # is INT8
_FUSED = {"aten.relu.default", "aten.hardtanh.default", "aten.clamp.default"}
_PADS = {"aten.constant_pad_nd.default", "aten.pad.default"}


def trace_operators(program: ExportedProgram) -> list[dict[str, Any]]:
    """List the convolutions, matrix products and INT8 conversions of an edge program in running order.

    Returns:
        Per layer ``{"layer", "int8", "shape", "multiply_adds"}`` with the shape of its output; a second call
        is ``name#2``. Per conversion ``{"conversion": names of the layers that need it}``.
    """
    nodes = list(_nodes(program))
    names = _name_layers(nodes)
    return [
        _describe(node, names[node]) if node in names else {"conversion": _beneficiaries(node, names)}
        for node in nodes
        if node in names or _is_conversion(node)
    ]


def _nodes(program: ExportedProgram) -> Iterator[Node]:
    """Yield the operators of a program; those of a delegate in place of its call."""
    for node in program.graph.nodes:
        if "call_delegate" in _operator(node):
            lowered = getattr(program.graph_module, node.args[0].target)
            yield from (n for n in lowered.original_module.graph.nodes if n.op == "call_function")
        elif node.op == "call_function":
            yield node


def _name_layers(nodes: list[Node]) -> dict[Node, str]:
    layers = [node for node in nodes if _operator(node) in _LAYERS or _operator(node) in _BLOCKS]
    names = number_repeats(module_path(node) or "the network itself" for node in layers)
    return dict(zip(layers, names, strict=True))


def _operator(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else ""


def _is_conversion(node: Node) -> bool:
    """Whether the runtime runs a node as an operator of its own between float and INT8."""
    if is_quant(node) and is_dynamic_qdq(node):
        return True  # with the range of each image
    converts = is_quant(node) or (is_dequant(node) and not is_per_channel(node))
    return bool(converts and not is_tagged_as_implicit_q_dq(node))


def _beneficiaries(node: Node, names: dict[Node, str]) -> list[str]:
    """Return the names of the INT8 layers that need a conversion."""
    if is_quant(node):
        layers = _search(node, names, lambda n: list(n.users))
    else:
        layers = _search(node, names, lambda n: n.all_input_nodes[:1])
    return sorted({names[layer] for layer in layers})


def _search(node: Node, names: dict[Node, str], follow: Callable[[Node], list[Node]]) -> Iterator[Node]:
    """Yield the layers at the other end of fused conversions, pads and fused activations."""
    for other in follow(node):
        if other in names:
            yield other
        elif _operator(other) in _FUSED | _PADS or (
            (is_quant(other) or is_dequant(other)) and not _is_conversion(other)
        ):
            yield from _search(other, names, follow)


def _describe(node: Node, name: str) -> dict[str, Any]:
    shape = list(node.meta["val"].shape)
    if _operator(node) in _BLOCKS:
        counted = _block_multiply_adds(node)
        return {"layer": name, "int8": _BLOCKS[_operator(node)], "shape": shape, "multiply_adds": counted}
    is_int8 = any(is_dequant(x) and not _is_conversion(x) for x in node.all_input_nodes)
    return {"layer": name, "int8": is_int8, "shape": shape, "multiply_adds": multiply_adds(node)}


def _block_multiply_adds(node: Node) -> int:
    """Count the multiply-adds of a block's three convolutions, a mask of ones."""
    (height, width), (h, w) = (shape_of(value)[2:] for value in (node.args[0], node))
    positions = {"expand": height * width, "depthwise": h * w, "project": h * w}
    arguments = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    called = dict(zip(arguments, node.args, strict=False))
    each = (math.prod(shape_of(called[name])) * count for name, count in positions.items())
    return shape_of(node)[0] * sum(each)
