"""Constants of a graph: add one, replace a layer's weight or bias, copy shared ones, compute them once."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgedyn.graph.nodes import COUNTED_OPS, argument, attribute


def add_constant(
    module: fx.GraphModule,
    before: fx.Node,
    name: str,
    value: Tensor | nn.Parameter,
    meta: Mapping[str, Any],
) -> fx.Node:
    """Store a tensor in a module and insert the node that reads it; the caller recompiles the module.

    Args:
        module: changed in place.
        before: the new node is inserted in front of this one.
        name: attribute of the module; another tensor of that name is replaced.
        value: a parameter is stored as one, any other tensor as a buffer.
        meta: of the new node, for instance ``{"val": value}``.
    """
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta = dict(meta)
    return node


def store_parameter(module: fx.GraphModule, path: str, value: nn.Parameter) -> None:
    """Store a parameter at a dotted path of a module, in place of the tensor there."""
    folder, _, leaf = path.rpartition(".")
    owner = module.get_submodule(folder)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_parameter(leaf, value)


def frozen(value: Tensor) -> nn.Parameter:
    """Return a copy of a tensor as a parameter without gradient."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def set_constant(module: fx.GraphModule, node: fx.Node, index: int, value: Tensor) -> None:
    """Replace the weight (1) or bias (2) of a convolution or linear layer; a missing bias is added.

    The exported program that the module was made from keeps the old tensor.
    """
    old = node.args[index] if len(node.args) > index else None
    name = f"{node.name}_{'weight' if index == 1 else 'bias'}_calibrated"
    if isinstance(old, fx.Node) and old.target == name:
        module.register_parameter(name, frozen(value))
        return
    meta = {**(old.meta if isinstance(old, fx.Node) else {}), "val": value.detach()}
    constant = add_constant(module, node, name, frozen(value), meta)
    node.args = (*node.args[:index], constant, *node.args[index + 1 :])
    if isinstance(old, fx.Node) and not old.users:
        module.graph.erase_node(old)
        folder, _, leaf = str(old.target).rpartition(".")
        delattr(module.get_submodule(folder), leaf)


def unshare_constants(module: fx.GraphModule, operators: Container[Any]) -> None:
    """Copy weights and biases until every call of a convolution or linear layer has its own.

    A layer that is called twice shares them. XNNPACK then keeps the quantization parameters of the first call
    for a shared bias, silently wrong at the second (executorch 1.5.1). NNCF quantizes a shared weight at one
    call only (3.4). A BatchNorm is folded into the weight of one call, which no other operator may read.

    Args:
        module: a float program, changed in place.
        operators: overloads of the convolutions and linear layers to look at.
    """
    constants = [node for node in module.graph.nodes if node.op == "get_attr"]
    seen = {str(c.target) for c in constants if any(user.target not in operators for user in c.users)}
    for node in [n for n in module.graph.nodes if n.target in operators]:
        for index, constant in enumerate(node.args[1:3], start=1):
            if isinstance(constant, fx.Node) and constant.op == "get_attr" and constant.target in seen:
                name = f"{str(constant.target).replace('.', '_')}_of_{node.name}"
                copied = add_constant(module, node, name, frozen(attribute(module, constant)), constant.meta)
                node.update_arg(index, copied)
            elif isinstance(constant, fx.Node):
                seen.add(str(constant.target))
    module.recompile()


def fold_constants(program: ExportedProgram) -> ExportedProgram:
    """Replace every value that is computed from parameters and buffers alone by a stored tensor.

    Networks normalise, mask and mix their weights in ``forward``; forms reshape the constants of an op.
    Runtimes need a convolution's weight as a stored tensor: XNNPACK (executorch 1.5.1) leaves a convolution
    with a view of a buffer to the portable kernels. Quantized weights stay as they are, because targets
    recognise them by their dequantize node.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return export_again(program, module) if store_constants(module) else program


def store_constants(module: fx.GraphModule) -> bool:
    """Store the constants that ``fold_constants`` folds in a module; return whether there were any."""
    values = _constant_values(module)
    tensors = [node for node in values if node.op == "call_function" and isinstance(values[node], Tensor)]
    # a factory such as arange costs nothing at run time and stays, unless a layer takes it as its weight
    computed = [node for node in tensors if node.all_input_nodes or _is_weight(node)]
    stored = [node for node in computed if any(user not in values for user in node.users)]
    for node in stored:
        value = values[node].detach().clone(memory_format=torch.contiguous_format)
        constant = add_constant(module, node, f"constant_{node.name}", value, node.meta)
        node.replace_all_uses_with(constant, lambda user: user not in values)
    for node in reversed(values):
        if not node.users:
            module.graph.erase_node(node)  # dead code elimination keeps operators that work in place
    module.graph.eliminate_dead_code()
    module.recompile()
    return bool(stored)


def export_again(program: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    """Export a changed module of a program, without the constants that its graph no longer reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n not in read]:
        folder, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(folder), leaf)
    assert program.example_inputs is not None  # torch.export.export always keeps them
    args, kwargs = program.example_inputs
    return torch.export.export(module, args, kwargs)


def _is_weight(node: fx.Node) -> bool:
    """Tell whether a convolution or linear layer takes a node as its weight."""
    return any(user.target in COUNTED_OPS and user.args[1] is node for user in node.users)


def _constant_values(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Evaluate the nodes that read constants and nothing else."""
    values: dict[fx.Node, Any] = {}
    changed = changed_in_place(module.graph)
    for node in module.graph.nodes:
        if node in changed:
            continue
        if node.op == "get_attr":
            values[node] = attribute(module, node)
        elif _is_foldable(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                if is_in_place(node):
                    args = (args[0].clone(), *args[1:])
                values[node] = node.target(*args, **kwargs)
    return values


def _is_foldable(node: fx.Node) -> bool:
    """Tell whether a node computes the same from the same constants, and is no part of quantization."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and (not target._schema.is_mutable or works_on_its_own(node))
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose memory an operator changes through a view, or where a view shows it."""
    in_place = [node for node in graph.nodes if is_in_place(node) and not works_on_its_own(node)]
    return {memory_of(argument(node, 0)) for node in in_place}


def work_on_copy(node: fx.Node) -> None:
    """Let an operator that works in place on its own return a new value: its input can be read later."""
    if not (is_in_place(node) and works_on_its_own(node)):
        return
    target: Any = node.target
    copying = getattr(torch.ops.aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    node.target = getattr(copying, target._overloadname, target)


def works_on_its_own(node: fx.Node) -> bool:
    """Tell whether an operator that works in place changes a value that no view shows."""
    source = argument(node, 0)
    return (
        isinstance(source, fx.Node)
        and source.op == "call_function"
        and not any(_is_view(other) for other in (source, *source.users))
    )


def is_in_place(node: fx.Node) -> bool:
    """Tell whether an operator changes an argument, as ``relu_`` does."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable and node.args)


def memory_of(node: Any) -> Any:
    """Return the node whose memory a view shares."""
    while isinstance(node, fx.Node) and node.op == "call_function" and _is_view(node):
        node = argument(node, 0)
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether a node shares the memory of its input; one of a list of views does."""
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))
