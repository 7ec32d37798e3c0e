"""Decisions of a program: masks, and all other operators from real numbers to booleans or integers.

    logits >= threshold     a mask     1 or 0 at every position

A decision has no small errors. So the layer that computes the compared values stays float in every precision.
Decisions are found in the graph alone, so that this works for any network.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from edgedyn.graph.nodes import COUNTED_OPS, module_path
from edgedyn.ops import is_ours

_COMPARISONS: Mapping[Any, Callable[[np.ndarray, float], np.ndarray]] = {
    torch.ops.aten.ge.Scalar: operator.ge,
    torch.ops.aten.gt.Scalar: operator.gt,
    torch.ops.aten.le.Scalar: operator.le,
    torch.ops.aten.lt.Scalar: operator.lt,
}
_STEPS = {"bucketize", "ceil", "floor", "floor_divide", "heaviside", "round", "sign", "sgn", "trunc"}


@dataclass(frozen=True)
class Mask:
    """A comparison of a float activation with a number, in a program.

    Attributes:
        node: name of the comparison.
        logits: name of the node that computes the activation.
        path: dotted path of the module that compares.
        threshold: the number.
        compare: ge, gt, le or lt.
        is_floor: whether it is ``floor(clamp(logits, -1, 0))``, which is 0 where logits >= 0, else -1: the
            comparison of runtimes that have no booleans.
    """

    node: str
    logits: str
    path: str
    threshold: float
    compare: Callable[[np.ndarray, float], np.ndarray]
    is_floor: bool = False

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Return the mask, booleans."""
        return self.compare(logits, self.threshold)


def find_decisions(program: ExportedProgram) -> tuple[list[Mask], int]:
    """List the masks of a program, and count its other data-dependent decisions."""
    deciding, _ = _decide(program.graph, program.graph_signature.user_inputs)
    masks = [mask for mask in map(_read_mask, deciding) if mask is not None]
    return masks, len(deciding) - len(masks)


def find_deciding(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes of a folded program that decide: comparisons, indices, step functions."""
    return _decide(module.graph, _inputs(module))[0]


def find_decided(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes of a folded program that decide, and those computed from decisions alone: masks."""
    return _decide(module.graph, _inputs(module))[1]


def find_deciding_layers(module: fx.GraphModule, *, is_router: bool = False) -> list[fx.Node]:
    """Return the last convolutions and linear layers in front of every decision of a folded program.

    The search goes back from each comparison through float operators to the layers. It stops at an activation
    that is not compared itself and has other readers: a feature map, not logits. So where a residual sum is
    compared, only the layers that write this sum stay float, and not those of all earlier sums.

    Args:
        module: a folded program.
        is_router: whether the host compares the program's first output.
    """
    cone = set(find_deciding(module))
    masks = {mask.logits for mask in map(_read_mask, cone) if mask is not None}
    compared = {source for node in cone for source in node.all_input_nodes}
    compared |= {node for node in module.graph.nodes if node.name in masks}
    if is_router:
        end = next(node for node in module.graph.nodes if node.op == "output")
        compared.add(end.args[0][0] if isinstance(end.args[0], tuple | list) else end.args[0])
    layers = []
    for node in reversed(module.graph.nodes):
        if node.op != "call_function" or not (node in compared or cone.intersection(node.users)):
            continue
        if node.target in COUNTED_OPS:
            layers.append(node)
        elif not is_ours(node) and (node in compared or cone.issuperset(node.users)):
            cone.add(node)
    return layers


def _inputs(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes if node.op == "placeholder"]


def _decide(graph: fx.Graph, inputs: Collection[str]) -> tuple[list[fx.Node], set[fx.Node]]:
    """List the nodes that decide, and all nodes computed from decisions alone, themselves included.

    A decision is a boolean or integer computed from the input (a comparison, an index), or a step function of
    it. A node computed from decisions alone decides nothing more.
    """
    from_input = {node for node in graph.nodes if node.op == "placeholder" and node.name in inputs}
    decided: set[fx.Node] = set()
    deciding = []
    for node in graph.nodes:
        sources = from_input.intersection(node.all_input_nodes)
        if node.op != "call_function" or not sources:
            continue
        from_input.add(node)
        if sources <= decided:
            decided.add(node)
            continue
        name = getattr(node.target, "_opname", "")
        if name in _STEPS or (not _is_float(node) and all(_is_float(x) for x in sources - decided)):
            decided.add(node)
            deciding.append(node)
    return deciding, decided


def _read_mask(node: fx.Node) -> Mask | None:
    """Return a deciding node as a mask, or None where it is none."""
    source, path = node.args[0], module_path(node)
    if not isinstance(source, fx.Node):
        return None
    if node.target in _COMPARISONS:
        threshold: Any = node.args[1]
        return Mask(node.name, source.name, path, float(threshold), _COMPARISONS[node.target])
    is_clamp = source.target is torch.ops.aten.clamp.default and tuple(source.args[1:]) == (-1, 0)
    if node.target is torch.ops.aten.floor.default and is_clamp and isinstance(source.args[0], fx.Node):
        return Mask(node.name, source.args[0].name, path, 0.0, operator.ge, is_floor=True)
    return None


def _is_float(node: fx.Node) -> bool:
    """Whether all outputs of a graph node stand for real numbers, quantized ones included."""
    if getattr(node.target, "namespace", "") == "quantized_decomposed":
        return True
    value: Any = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(v.is_floating_point() for v in values if hasattr(v, "is_floating_point"))
