"""Graph rewrites around lower precisions that the runtimes and NNCF need; each names who fails without it.

    to_float16                float16, with islands that stay float32
    to_float64                float64, to measure what a rewrite changes
    explicit_padding     before quantizing: "same" and "valid" become numbers
    unshare_constants    before folding and quantizing: every convolution has its own weight and bias

They are exact, but for ``to_float16``.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Container
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram


def explicit_padding(module: fx.GraphModule) -> None:
    """Write the padding of convolutions as numbers: quantizers and XNNPACK know ``conv2d.default`` only.

    One that pads unevenly, "same" with an even kernel, stays as it is.
    """
    for node in module.graph.nodes:
        if node.target is not torch.ops.aten.conv2d.padding:
            continue
        x, weight, *rest = node.args
        given: list[Any] = [*rest, *(None, (1, 1), "valid", (1, 1), 1)[len(rest) :]]
        bias, stride, padding, dilation, groups = given
        sides = weight.meta["val"].shape[2:]
        both = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, sides, strict=True)]
        if not any(size % 2 for size in both):
            node.target = torch.ops.aten.conv2d.default
            node.args = (x, weight, bias, stride, [size // 2 for size in both], dilation, groups)
    module.recompile()


def unshare_constants(module: fx.GraphModule, readers: Container[Any]) -> None:
    """Give every convolution and linear layer its own weight and bias, also where a layer is called twice.

    XNNPACK keeps a shared bias in the steps of its first reader, silently wrong at the second (executorch
    1.5.1), NNCF quantizes a shared weight at one place only (3.4), and torchao folds the BatchNorm of every
    call into the one weight (0.18).

    Args:
        module: a float program, changed in place.
        readers: the operators of convolutions and linear layers.
    """
    seen: set[str] = set()
    for node in [n for n in module.graph.nodes if n.target in readers]:
        for index, constant in enumerate(node.args[1:3], start=1):
            if isinstance(constant, fx.Node) and constant.op == "get_attr" and constant.target in seen:
                name = f"{str(constant.target).replace('.', '_')}_of_{node.name}"
                value = attribute(module, constant).detach().clone()
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
                with module.graph.inserting_before(node):
                    copied = module.graph.get_attr(name)
                copied.meta = dict(constant.meta)
                node.update_arg(index, copied)
            elif isinstance(constant, fx.Node):
                seen.add(str(constant.target))
    module.recompile()


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """Return what a ``get_attr`` node reads: a constant, or a module that is called."""
    return operator.attrgetter(str(node.target))(module)


def convolution_arguments(node: fx.Node) -> tuple[Any, Any, Any, int]:
    """Return stride, padding, dilation and groups of a convolution's call."""
    if node.target is torch.ops.aten.convolution.default:
        stride, padding, dilation, _, _, groups = node.args[3:9]
        return stride, padding, dilation, int(groups)  # type: ignore[arg-type]
    given = [*node.args[3:], *((1, 1), (0, 0), (1, 1), 1)[len(node.args[3:]) :]]
    return given[0], given[1], given[2], int(given[3])  # type: ignore[arg-type]


def to_float16(module: fx.GraphModule, islands: Collection[fx.Node]) -> None:
    """Turn a float32 program to float16, but for the nodes of ``islands``, with casts at their shores.

    What normalises or decides has constants and differences that float16 cannot hold. What decides on an
    island's value belongs to it. A constant that both sides read is halved, and cast for the island.
    """
    constants = {node for node in module.graph.nodes if node.op == "get_attr" and _is_float(node)}
    kept = {node for node in constants if node.users and all(user in islands for user in node.users)}
    names = {str(node.target) for node in kept} - {str(node.target) for node in constants - kept}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in names and tensor.is_floating_point():
            tensor.data = tensor.data.half()
    inside = {*islands, *kept}
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and inside.issuperset(sources) and not _is_float(node):
            inside.add(node)
    casts: dict[fx.Node, fx.Node] = {}
    drop_type_assertions(module)
    for node in list(module.graph.nodes):
        if node.op in ("call_function", "output"):
            _cast_arguments(module, node, inside, casts)
            if node not in inside:
                name_type(node, torch.float16)
    module.recompile()


def to_float64(module: fx.GraphModule) -> None:
    """Turn a float32 program to float64, its casts and the constants that it makes too."""
    module.double()
    drop_type_assertions(module)
    for node in module.graph.nodes:
        name_type(node, torch.float64)
    module.recompile()


def to_float64_like(program: ExportedProgram, source: nn.Module) -> nn.Module:
    """Return a program in float64 with the tensors of its source, whose dotted names it keeps."""
    module = copy.deepcopy(program.module())
    assert isinstance(module, fx.GraphModule)
    to_float64(module)
    wanted = dict(source.named_parameters()) | dict(source.named_buffers())
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in wanted and tensor.shape == wanted[name].shape:
                tensor.copy_(wanted[name])
    return module


def drop_type_assertions(module: fx.GraphModule) -> None:
    """Remove what asserts the types that casts had when the program was captured."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)


def name_type(node: fx.Node, dtype: torch.dtype) -> None:
    """Put a type where a node's arguments name float32."""

    def change(argument: Any) -> Any:
        return dtype if argument is torch.float32 else argument

    node.args = fx.node.map_aggregate(node.args, change)
    node.kwargs = fx.node.map_aggregate(node.kwargs, change)


def _cast_arguments(
    module: fx.GraphModule, node: fx.Node, inside: Container[fx.Node], casts: dict[fx.Node, fx.Node]
) -> None:
    """Cast what a node reads from the other shore, each value once."""
    wanted = torch.float32 if node in inside else torch.float16
    for source in node.all_input_nodes:
        if (source in inside) == (node in inside) or not _is_float(source):
            continue
        if source not in casts:
            with module.graph.inserting_after(source):
                cast = module.graph.call_function(
                    torch.ops.aten._to_copy.default, (source,), {"dtype": wanted}
                )
            cast.meta = dict(source.meta)
            casts[source] = cast
        node.replace_input_with(source, casts[source])


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
