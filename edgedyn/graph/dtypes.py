"""Change the floating-point type of a program.

to_float16    float16, with excluded nodes in float32 between boundary casts
to_float64    float64, to measure the error of a rewrite; exact
InFloat64     the same for code: a network that calls ``.float()`` or ``linspace`` computes in float64, too
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Container, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_TO_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def to_float16(module: fx.GraphModule, excluded: Collection[fx.Node]) -> None:
    """Convert a float32 program to float16 in place; excluded nodes stay float32, with casts at the boundary.

    Norms and decisions have constants and differences that float16 cannot represent. A decision on the values
    of excluded nodes is excluded, too. A constant with consumers on both sides becomes float16, and is cast
    for the excluded ones.
    """
    constants = {node for node in module.graph.nodes if node.op == "get_attr" and _is_float(node)}
    kept = {node for node in constants if node.users and all(user in excluded for user in node.users)}
    names = {str(node.target) for node in kept} - {str(node.target) for node in constants - kept}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in names and tensor.is_floating_point():
            tensor.data = tensor.data.half()
    float32 = {*excluded, *kept}
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and float32.issuperset(sources) and not _is_float(node):
            float32.add(node)
    casts: dict[fx.Node, fx.Node] = {}
    drop_type_assertions(module)
    for node in list(module.graph.nodes):
        if node.op in ("call_function", "output"):
            _cast_arguments(module, node, float32, casts)
            if node not in float32:
                set_dtype(node, torch.float16)
    module.recompile()


def to_float64(module: fx.GraphModule) -> None:
    """Convert a float32 program to float64 in place: constants, casts, and the tensors that it creates."""
    module.double()._apply(_double)  # type: ignore[no-untyped-call]
    drop_type_assertions(module)
    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _double)
    module.recompile()


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute in float64 wherever code names float32, or a tensor of the default type; complex likewise."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator of torch with float64 in its arguments."""
        args, kwargs = tree_map(_double, (args, kwargs or {}))
        with float64_by_default():
            return function(*args, **kwargs)


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    """Let ``linspace`` and its like make float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _double(value: Any) -> Any:
    """Return a tensor or a type in float64 in place of float32, any other value as it is."""
    if isinstance(value, Tensor):
        return value.to(_TO_DOUBLE.get(value.dtype, value.dtype))
    return _TO_DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


def to_float64_like(program: ExportedProgram, source: nn.Module) -> nn.Module:
    """Return a program in float64 with the tensors of its source module, which has the same dotted names."""
    module = copy.deepcopy(program.module())
    assert isinstance(module, fx.GraphModule)
    to_float64(module)
    originals = dict(source.named_parameters()) | dict(source.named_buffers())
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in originals and tensor.shape == originals[name].shape:
                tensor.copy_(originals[name])
    return module


def drop_type_assertions(module: fx.GraphModule) -> None:
    """Remove the assertions on the types that casts had when the program was captured."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)


def set_dtype(node: fx.Node, dtype: torch.dtype) -> None:
    """Replace float32 by another type in a node's arguments."""

    def change(argument: Any) -> Any:
        return dtype if argument is torch.float32 else argument

    node.args = fx.node.map_aggregate(node.args, change)
    node.kwargs = fx.node.map_aggregate(node.kwargs, change)


def _cast_arguments(
    module: fx.GraphModule, node: fx.Node, float32: Container[fx.Node], casts: dict[fx.Node, fx.Node]
) -> None:
    """Cast the inputs of a node that come from the other side of the boundary, each value once."""
    dtype = torch.float32 if node in float32 else torch.float16
    for source in node.all_input_nodes:
        if (source in float32) == (node in float32) or not _is_float(source):
            continue
        if source not in casts:
            with module.graph.inserting_after(source):
                to_copy = torch.ops.aten._to_copy.default
                cast = module.graph.call_function(to_copy, (source,), {"dtype": dtype})
            cast.meta = dict(source.meta)
            casts[source] = cast
        node.replace_input_with(source, casts[source])


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
