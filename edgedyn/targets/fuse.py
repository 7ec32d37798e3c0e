"""Programs that call our own kernels: dequantize, op, quantize become one INT8 node.

    quantize(op(dequantize(q, s, z), ...), s', z')  ->  op_int8(q, s, z, ..., s', z')

The kernel computes the same in one pass, so no float feature map is written or read in between. Where x is
not INT8, or a reader of y is not, the op stays float: an activation that follows it, a sum, a filter of ours,
the network's output.
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
    """Return a program whose ops of ours between INT8 tensors are INT8 nodes."""
    twins = {
        op.overload: getattr(torch.ops.edgedyn, f"{op.name}_int8").default for op in ops.load_all().values()
    }
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    fused = [_fuse(module, n, twins[n.target]) for n in list(module.graph.nodes) if n.target in twins]
    if not any(fused):
        return program
    module.graph.eliminate_dead_code()
    module.recompile()
    assert program.example_inputs is not None  # torch.export keeps them
    return torch.export.export(module, *program.example_inputs)


def _fuse(module: fx.GraphModule, node: fx.Node, twin: Any) -> bool:
    """Put the INT8 twin in place of an op, where its x and all that reads y are INT8 of one scale, or not."""
    x, readers = node.args[0], list(node.users)
    assert isinstance(x, fx.Node)
    steps = {_step(reader, _PAIR.quantize_per_tensor.default) for reader in readers}
    given = _step(x, _PAIR.dequantize_per_tensor.default)
    if given is None or len(steps) != 1 or None in steps:
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    rest = [node.args[k] if k < len(node.args) else a.default_value for k, a in enumerate(schema)][1:]
    with module.graph.inserting_before(node):
        stored = module.graph.call_function(twin, (x.args[0], *given, *rest, *steps.pop()))  # type: ignore[misc]
    stored.meta = dict(readers[0].meta)
    for reader in readers:
        reader.replace_all_uses_with(stored)
        module.graph.erase_node(reader)
    module.graph.erase_node(node)
    return True


def _step(node: fx.Node, kind: Any) -> tuple[float, int] | None:
    """Return scale and zero point of a Q or DQ node of int8, None for anything else."""
    if node.target is not kind or node.args[3:6] != (-128, 127, torch.int8):
        return None
    return node.args[1], node.args[2]  # type: ignore[return-value]
