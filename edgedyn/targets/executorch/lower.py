"""Lower a program to a ``.pte`` for ExecuTorch's stock runtime with XNNPACK."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    DeQuantizedPerTensorConfig,
    GenericNodePartitionerConfig,
    QuantizedPerTensorConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from torch.export import ExportedProgram

from edgedyn.targets import Artifact


def lower(program: ExportedProgram, out: Path, precision: str) -> Artifact:
    """Write ``model.pte``; what XNNPACK leaves stays on the portable kernels and is counted in the facts.

    Args:
        program: float32, or INT8 as Q/DQ pairs.
        out: existing folder.
        precision: ``fp32`` or ``int8``; the program already is of it.

    Returns:
        The artifact; facts: ``delegates``, ``portable`` (op name -> count), ``executorch`` version.
    """
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[_partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=True),
    )
    delegates, portable = _count(edge)
    with (out / "model.pte").open("wb") as file:
        edge.to_executorch().write_to_file(file)
    facts = {"delegates": delegates, "portable": portable, "executorch": version("executorch")}
    return Artifact(files=("model.pte",), facts=facts)


def _partitioner() -> XnnpackPartitioner:
    """Make a partitioner that takes Q/DQ pairs literally: only convolutions and linear layers are INT8.

    The stock one also makes a quantized operator of any ``DQ -> op -> Q``. A max pool between convolutions
    then dies when loaded, because its two scales differ; so does a product that shares the DQ with a global
    average pool, because the pool's claim leaves it an int8 operand (executorch 1.5.1). ``quantize`` means
    them as float.
    """
    partitioner = XnnpackPartitioner()
    for config in partitioner.target_partitioner_configs.values():
        converts = isinstance(config, QuantizedPerTensorConfig | DeQuantizedPerTensorConfig)
        if isinstance(config, GenericNodePartitionerConfig) and not converts:
            config.set_enabled_precision_types([ConfigPrecisionType.FP32])
    return partitioner


def _count(edge: EdgeProgramManager) -> tuple[int, dict[str, int]]:
    """Count delegate calls, and the nodes left to portable kernels by op name."""
    delegates, portable = 0, Counter[str]()
    for node in edge.exported_program().graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") == "getitem":
            continue
        name = str(getattr(node.target, "__name__", node.target))
        if "call_delegate" in name:
            delegates += 1
        else:
            portable[name] += 1
    return delegates, dict(sorted(portable.items()))
