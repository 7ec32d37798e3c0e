"""The few values that an activation can have: a mask of decisions holds 0 and 1 and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import argument, constant_of

_MOST = 16  # values
_STEPS: dict[str, Callable[[float], float]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "round": round,
    "trunc": math.trunc,
}
_FILLS = {"ones": 1, "ones_like": 1, "zeros": 0, "zeros_like": 0}
# operators that copy values of their first argument to other places or types
_COPIES = {
    "_to_copy",
    "clone",
    "contiguous",
    "dropout",
    "flatten",
    "max_pool2d",
    "repeat",
    "repeat_interleave",
    "reshape",
    "to",
    "type_as",
    "upsample_nearest2d",
}


def is_binary(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node can hold 0 and 1 only, whatever the program's input: a decision, no attention map."""
    values = possible_values(module, node)
    return values is not None and bool(((values == 0) | (values == 1)).all())


def possible_values(module: fx.GraphModule, node: object) -> Tensor | None:
    """Return the values that a node can have, (n,) and sorted; None where they are many or unknown.

    NaN is left out: a decision on NaN is none.

    Args:
        module: a captured program.
        node: one of its nodes.
    """
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(node, fx.Node) or not isinstance(value, Tensor):
        return None
    if node.op == "get_attr":
        return _few(constant_of(module, node).flatten())
    if value.dtype == torch.bool:
        return torch.tensor([False, True])
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._opname.removesuffix("_")
    if name in _FILLS or name in ("full", "full_like"):
        filled = _FILLS.get(name, argument(node, 1))
        return torch.tensor([filled]).to(value.dtype) if isinstance(filled, int | float) else None
    if name == "sign":
        return torch.tensor([-1, 0, 1]).to(value.dtype)
    if name in _STEPS and (bounds := _bounds(node.args[0])):
        low, high = (int(_STEPS[name](bound)) for bound in bounds)
        return _few(torch.arange(low, high + 1).to(value.dtype))
    if name in _COPIES or target.is_view:
        values = possible_values(module, node.args[0])
        return None if values is None else values.to(value.dtype)
    return _compute(module, node) if torch.Tag.pointwise in target.tags else None


def _bounds(node: Any) -> tuple[float, float] | None:
    """Return the range of an operator's output, where the operator bounds it."""
    name = getattr(getattr(node, "target", None), "_opname", "").removesuffix("_")
    if name in ("sigmoid", "hardsigmoid"):
        return 0.0, 1.0
    bounds = [argument(node, 1), argument(node, 2)] if name in ("clamp", "hardtanh") else []
    if not bounds or not all(isinstance(bound, int | float) for bound in bounds):
        return None
    return bounds[0], bounds[1]


def _compute(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Apply an operator that works by position to every combination of its arguments' values."""
    sources = [possible_values(module, source) for source in node.all_input_nodes]
    known = [values for values in sources if values is not None]
    if not known or len(known) < len(sources) or math.prod(map(len, known)) > _MOST**2:
        return None
    grids = torch.meshgrid([torch.arange(len(values)) for values in known], indexing="ij")
    combined = [values[grid.flatten()] for values, grid in zip(known, grids, strict=True)]
    values = dict(zip(node.all_input_nodes, combined, strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return _few(node.target(*args, **kwargs))  # type: ignore[operator]


def _few(values: Tensor) -> Tensor | None:
    """Return the different values, sorted; None of more than a few."""
    if values.numel() > 2**20:
        return None
    different = torch.unique(values.detach())
    return different if len(different) <= _MOST else None
