"""Look at a recipe without building it: each dynamic layer, its form, its multiply-adds and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from edgedyn import ops, pipeline
from edgedyn.layers import canonicalize, find_dynamic
from edgedyn.quantize import COUNTED_OPS, module_path, multiply_adds

if TYPE_CHECKING:
    from torch.fx import Node

    from edgedyn.recipe import Recipe


def inspect(recipe: Recipe, *, trust: bool = False) -> dict[str, Any]:
    """Return what a build would do; nothing is written.

    A layer's generator is what its grids are computed from and its input is not; what several calls share
    is counted at the first.

    Returns:
        ``layers``: a dictionary for each call of an op of ours, with ``path``, ``class``, ``paper``,
        ``primitive``, ``form``, ``grid`` (gh, gw), ``generator_macs``, ``apply_macs``, ``grid_bytes``; then
        ``shape``, ``parameters``, ``macs``, ``generator_share`` of the whole network. Multiply-adds are of
        one tile.

    Raises:
        EdgedynError: as ``pipeline.build`` would for the recipe, the target and the network.
    """
    target = pipeline.load_target(recipe)
    model = recipe.load_model(trust=trust)
    modules = dict(model.named_modules(remove_duplicate=False))
    papers = {module: layer.paper for _, module, layer in find_dynamic(model)}
    program = pipeline.capture(canonicalize(model), (torch.zeros(recipe.input.shape),))
    forms = {op.overload: form for op, form in ops.choose_forms(program, target, recipe.forms).items()}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    costs = {node: multiply_adds(node) for node in nodes if node.target in COUNTED_OPS}
    claimed: set[Node] = set()
    layers: list[dict[str, Any]] = []
    for node in nodes:
        if node.target not in forms:
            continue
        x, grids = node.args[0], [grid for grid in node.args[1:3] if grid is not None]
        generator = (_sources(grids) - _sources([x])) & costs.keys() - claimed
        claimed |= generator
        module = modules[module_path(node)]
        layers.append(
            {
                "path": module_path(node),
                "class": type(module).__name__,
                "paper": papers.get(module, "calls the op itself"),
                "primitive": node.target._opname,
                "form": forms[node.target].name,
                "grid": list(_value(grids[0]).shape[2:]),
                "generator_macs": sum(costs[n] for n in generator),
                "apply_macs": _apply_macs(node),
                "grid_bytes": sum(4 * _value(grid).numel() for grid in grids),
            }
        )
    applied, generated = (sum(layer[key] for layer in layers) for key in ("apply_macs", "generator_macs"))
    total = sum(costs.values()) + applied
    return {
        "recipe": recipe.name,
        "target": target.name,
        "precision": recipe.precision,
        "shape": list(recipe.input.shape),
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": total,
        "generator_share": generated / total if total else 0.0,
    }


def _sources(values: Iterable[Any]) -> set[Node]:
    """Return the graph nodes that values are computed from, themselves included."""
    found: set[Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _value(node: object) -> torch.Tensor:
    """Return the shape-carrying value of a graph node."""
    return node.meta["val"]  # type: ignore[attr-defined, no-any-return]


def _apply_macs(node: Node) -> int:
    """Count multiply-adds of slicing (4 a kernel value) and applying (1 a tap) at every output element."""
    grid, x = _value(node.args[1]), _value(node.args[0])
    slices = grid.shape[1] + (_value(node.args[2]).shape[1] if node.args[2] is not None else 0)
    pixels = x.shape[0] * math.prod(x.shape[2:])
    taps = int(node.args[3]) ** 2  # type: ignore[arg-type]
    return int(pixels * (4 * slices + taps * x.shape[1]))
