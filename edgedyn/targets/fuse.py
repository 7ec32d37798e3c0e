"""Fuse dequantize, op, quantize into one INT8 node, for programs that call our own kernels.

    quantize(op(dequantize(q, s, z), ...), s', z')  ->  op_int8(q, s, z, ..., s', z')

The kernel computes the same in one pass, without float feature maps in memory. The op stays float where x or
a consumer of y is not INT8: an activation that follows it, a sum, a filter of ours, the network's output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx
from torch.export import ExportedProgram

from edgedyn import ops

_PAIR = torch.ops.quantized_decomposed


def calls_kernels(program: ExportedProgram) -> bool:
    """Whether a program calls an op of ours."""
    return any(ops.is_ours(node) for node in program.graph.nodes)


def fuse_int8(program: ExportedProgram) -> ExportedProgram:
    """Return a program in which every op of ours between INT8 tensors is one INT8 node."""
    variants = {
        op.overload: getattr(torch.ops.edgedyn, f"{op.name}_int8").default
        for op in ops.load_all().values()
        if op.has_affine_int8
    }
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    fused = [_fuse(module, n, variants[n.target]) for n in list(module.graph.nodes) if n.target in variants]
    if not any(fused):
        return program
    module.graph.eliminate_dead_code()
    module.recompile()
    assert program.example_inputs is not None  # torch.export keeps them
    return torch.export.export(module, *program.example_inputs)


def _fuse(module: fx.GraphModule, node: fx.Node, variant: Any) -> bool:
    """Replace an op by its INT8 variant where x is INT8 and all consumers quantize y with one scale.

    Returns:
        Whether the op was replaced.
    """
    x, consumers = node.args[0], list(node.users)
    assert isinstance(x, fx.Node)
    of_y = {_qparams(consumer, _PAIR.quantize_per_tensor.default) for consumer in consumers}
    of_x = _qparams(x, _PAIR.dequantize_per_tensor.default)
    if of_x is None or len(of_y) != 1 or None in of_y:
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    rest = [node.args[k] if k < len(node.args) else a.default_value for k, a in enumerate(schema)][1:]
    with module.graph.inserting_before(node):
        y = module.graph.call_function(variant, (x.args[0], *of_x, *rest, *of_y.pop()))  # type: ignore[misc]
    y.meta = dict(consumers[0].meta)
    for consumer in consumers:
        consumer.replace_all_uses_with(y)
        module.graph.erase_node(consumer)
    module.graph.erase_node(node)
    return True


def _qparams(node: fx.Node, kind: Any) -> tuple[float, int] | None:
    """Return scale and zero point of an int8 Q or DQ node, None of any other node."""
    if node.target is not kind or node.args[3:6] != (-128, 127, torch.int8):
        return None
    return node.args[1], node.args[2]  # type: ignore[return-value]
