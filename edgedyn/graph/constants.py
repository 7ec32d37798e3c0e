"""What only constants determine is computed once, when a program is built: forms reshape an op's constants.

Runtimes take a convolution's weight as a stored tensor: XNNPACK (executorch 1.5.1) leaves one whose weight is
a view of a buffer to the portable kernels.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.graph.nodes import COUNTED_OPS
from edgedyn.graph.rewrites import attribute


def fold_constants(program: ExportedProgram) -> ExportedProgram:
    """Replace every value that only parameters and buffers determine by a stored tensor.

    Quantized weights stay as they are: a dequantize is how a target recognises them.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    values = _constant_values(module)
    tensors = [node for node in values if node.op == "call_function" and isinstance(values[node], Tensor)]
    # a factory, as arange, costs nothing to run, but a layer needs a stored weight
    computed = [node for node in tensors if node.all_input_nodes or _is_weight(node)]
    stored = [node for node in computed if any(user not in values for user in node.users)]
    if not stored:
        return program
    for node in stored:
        name = f"constant_{node.name}"
        module.register_buffer(name, values[node].detach().clone(memory_format=torch.contiguous_format))
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert program.example_inputs is not None  # torch.export.export always keeps them
    args, kwargs = program.example_inputs
    return torch.export.export(module, args, kwargs)


def _is_weight(node: fx.Node) -> bool:
    """Tell whether a convolution or linear layer takes a node as its weight."""
    return any(user.target in COUNTED_OPS and user.args[1] is node for user in node.users)


def _constant_values(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Evaluate the nodes that read constants and nothing else."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = attribute(module, node)
        elif _is_foldable(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
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
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )
