"""Lower a program to a ``.pte`` for ExecuTorch's stock runtime with XNNPACK."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    DeQuantizedPerTensorConfig,
    GenericNodePartitionerConfig,
    QuantizedPerTensorConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.runtime import Runtime
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgedyn.errors import ModelError
from edgedyn.graph.nodes import module_path
from edgedyn.targets import Artifact
from edgedyn.targets.executorch import kernels
from edgedyn.targets.executorch.operators import trace_operators
from edgedyn.targets.executorch.passes import apply_edge_passes, apply_passes
from edgedyn.targets.executorch.run import runtime_log
from edgedyn.targets.executorch.trial import refuse_failing
from edgedyn.targets.fuse import calls_kernels, fuse_int8
from edgedyn.targets.fuse_blocks import fuse_blocks

MODEL_NAME = "model.pte"
# the ranks that portable kernels take; the operator itself is known (executorch 1.5.1)
_RANKS = {"aten::convolution.out": (3, 4)}


def lower(
    programs: Mapping[str, ExportedProgram], out: Path, precision: str, *, fuses_blocks: bool = False
) -> Artifact:
    """Write ``model.pte``, one method per program.

    Args:
        programs: by name; float32, or INT8 as Q/DQ pairs.
        out: existing folder.
        precision: ``fp32`` or ``int8``, that of the programs.
        fuses_blocks: whether inverted-residual blocks become one call of our kernel each.

    Returns:
        The artifact; facts: ``delegates``, their number; ``portable``, {operator: count} on the portable
        kernels; ``executorch``, its version; ``operators``, the layer of each operator. Of several programs
        also ``methods``, delegates and portable of each, and ``shared_bytes``, saved by shared weights.

    Raises:
        ModelError: for an operator that the stock runtime lacks, with its node and the fix; where the runtime
            cannot load the program, or run it on its example inputs, with the runtime's own lines.
    """
    programs = _prepare(programs, fuses_blocks)
    edge = _to_edge(programs)
    counts = {name: _count(edge, name) for name in programs}
    operators = {name: trace_operators(edge.exported_program(name)) for name in programs}
    lowered = _to_executorch(edge)
    for name in programs:
        check_operators(lowered.exported_program(name), name)
    with (out / MODEL_NAME).open("wb") as file:
        lowered.write_to_file(file)
    for name, program in programs.items():
        refuse_failing(out / MODEL_NAME, name, program, lambda: _to_edge(programs, is_delegated=False))
    facts: dict[str, object] = {
        "delegates": sum(delegates for delegates, _ in counts.values()),
        "portable": dict(sorted(sum((portable for _, portable in counts.values()), Counter()).items())),
        "executorch": version("executorch"),
        "operators": operators,
    }
    if len(programs) > 1:
        apart = sum(len(_to_edge({n: p}).to_executorch().buffer) for n, p in programs.items())
        facts["shared_bytes"] = apart - (out / MODEL_NAME).stat().st_size
        facts["methods"] = {n: {"delegates": d, "portable": dict(p)} for n, (d, p) in counts.items()}
    return Artifact(dict.fromkeys(programs, MODEL_NAME), facts)


def preview(programs: Mapping[str, ExportedProgram], *, fuses_blocks: bool = False) -> dict[str, Any]:
    """Lower float programs in memory and count their operators: delegated, portable, unsupported."""
    edge = _to_edge(_prepare(programs, fuses_blocks))
    delegated, portable = 0, Counter[str]()
    for name in programs:
        portable += _count(edge, name)[1]
        for _, lowered in edge.exported_program(name).graph_module.named_children():
            inner = getattr(lowered, "original_module", None)
            nodes = inner.graph.nodes if inner is not None else []
            delegated += sum(node.op == "call_function" for node in nodes)
    lowered = _to_executorch(edge)
    unsupported = Counter[str]()
    for name in programs:
        unsupported += _complex_operators(edge.exported_program(name))
        missing = missing_operators(lowered.exported_program(name))
        unsupported += Counter({operator: len(nodes) for operator, nodes in missing.items()})
    return {
        "delegated": delegated / max(delegated + portable.total(), 1),
        "portable": dict(sorted(portable.items())),
        "unsupported": dict(unsupported),
    }


def _complex_operators(program: ExportedProgram) -> Counter[str]:
    """Count the operators on complex numbers: portable kernels compute spectra, and nothing with them."""
    complex_ = {n for n in program.graph.nodes if "aten." in str(n.target) and _is_complex(n)}
    found = [n for n in complex_ if "fft" not in str(n.target) and complex_.intersection(n.all_input_nodes)]
    return Counter(f"{str(n.target).partition('aten.')[2]} of complex numbers" for n in found)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _prepare(programs: Mapping[str, ExportedProgram], fuses_blocks: bool) -> Mapping[str, ExportedProgram]:
    """Apply the passes for XNNPACK; where a program calls our kernels, load them and fuse INT8 calls."""
    if fuses_blocks:
        programs = {name: fuse_blocks(program) for name, program in programs.items()}
    programs = {name: apply_passes(program) for name, program in programs.items()}
    if not any(calls_kernels(program) for program in programs.values()):
        return programs
    kernels.load()
    return {name: fuse_int8(program) for name, program in programs.items()}


def _to_edge(programs: Mapping[str, ExportedProgram], *, is_delegated: bool = True) -> EdgeProgramManager:
    """Make edge programs, with delegates or without.

    Raises:
        ModelError: where ExecuTorch fails, with its own line.
    """
    partitioner = _partitioner() if is_delegated else _Undelegated()
    try:
        return to_edge_transform_and_lower(
            {name: _with_own_constants(program) for name, program in programs.items()},
            transform_passes=[apply_edge_passes],
            partitioner=[partitioner],
            # ``check_operators`` compares operators beyond the core set with the runtime's list instead
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
    except Exception as error:  # its passes raise runtime, assertion, key and type errors alike
        raise ModelError(_cannot_lower(error)) from error


def _cannot_lower(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__
    return (
        f"ExecuTorch {version('executorch')} cannot make a program of the network: {line}. Write its layers "
        "with other operators, or pick another form in the recipe (forms)."
    )


def _with_own_constants(program: ExportedProgram) -> ExportedProgram:
    """Return the program with a table of constants of its own.

    A delegate removes the constants that it consumes from that table; the caller's program shares the table
    and would keep buffers without values (executorch 1.5.1).
    """
    own = copy.copy(program)
    own._constants = dict(program.constants)
    return own


def _to_executorch(edge: EdgeProgramManager) -> Any:
    """Plan memory and choose kernels.

    Raises:
        ModelError: for an operator without a ``.out`` variant, which every kernel of the runtime is; for
            effects such as the checks of linear algebra.
    """
    try:
        return edge.to_executorch()
    except Exception as error:  # its passes raise attribute errors too
        raise ModelError(_cannot_lower(error)) from error


def check_operators(program: ExportedProgram, name: str) -> None:
    """Refuse a lowered program with operators that the stock runtime does not have.

    The runtime's own error is ``Failed to load method, error: 0x14``, with the name on standard error only.

    Raises:
        ModelError: naming the operators, their nodes and the layers that these come from.
    """
    missing = missing_operators(program)
    if missing:
        shown = "; ".join(f"{op} ({', '.join(nodes[:3])})" for op, nodes in sorted(missing.items()))
        raise ModelError(
            f"program {name!r} calls operators that ExecuTorch {version('executorch')}'s stock runtime does "
            f"not have: {shown}. Write these layers with other operators, or pick "
            "another form in the recipe (forms)."
        )


def missing_operators(program: ExportedProgram) -> dict[str, list[str]]:
    """Return the operators that the stock runtime does not have: {operator: ["node of layer", ...]}."""
    with runtime_log():
        known = set(Runtime.get().operator_registry.operator_names)
    missing: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        operator = operator_name(node.target) if node.op == "call_function" else None
        rank = len(node.args[0].meta["val"].shape) if operator in _RANKS else 0
        if operator in _RANKS and rank not in _RANKS[operator]:
            operator = f"{operator} of rank {rank}"
        if operator is not None and operator not in known:
            missing.setdefault(operator, []).append(
                f"{node.name} of {module_path(node) or 'the network itself'}"
            )
    return missing


def operator_name(target: object) -> str | None:
    """Return the runtime's name of an operator, ``aten::add.out``; None where the target is no operator."""
    schema = getattr(target, "_schema", None)
    if schema is None or "call_delegate" in str(schema.name):
        return None
    return str(schema.name) + (f".{schema.overload_name}" if schema.overload_name else "")


class _Undelegated(XnnpackPartitioner):  # type: ignore[misc]
    """Keeps the operators that XNNPACK takes whole, as the delegates do, and delegates none."""

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        return PartitionResult(exported_program, {})


def _partitioner() -> XnnpackPartitioner:
    """Make a partitioner that takes Q/DQ pairs literally: only convolutions and linear layers are INT8.

    The stock partitioner also turns any ``DQ -> op -> Q`` into a quantized operator. Programs then fail to
    load: a max pool between convolutions, because its two scales differ; a product that shares the DQ with a
    global average pool, because the partitioner gives the DQ to the pool and leaves the product an int8
    operand (executorch 1.5.1). ``edgedyn.quantize`` keeps these operators in float. It takes any maximum
    over an axis, too, and then fails on all but rows and columns: "only supports dim == 2 or dim == 3".
    """
    partitioner = XnnpackPartitioner()
    del partitioner.target_partitioner_configs["max.dim"]
    for config in partitioner.target_partitioner_configs.values():
        converts = isinstance(config, QuantizedPerTensorConfig | DeQuantizedPerTensorConfig)
        if isinstance(config, GenericNodePartitionerConfig) and not converts:
            config.set_enabled_precision_types([ConfigPrecisionType.FP32])
    return partitioner


def _count(edge: EdgeProgramManager, name: str) -> tuple[int, Counter[str]]:
    """Return the number of delegate calls, and {operator: count} of the nodes on portable kernels."""
    delegates, portable = 0, Counter[str]()
    for node in edge.exported_program(name).graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") == "getitem":
            continue
        called = str(getattr(node.target, "__name__", node.target))
        if "call_delegate" in called:
            delegates += 1
        else:
            portable[called] += 1
    return delegates, portable
