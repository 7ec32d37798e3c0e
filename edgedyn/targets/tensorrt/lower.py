"""Lower programs to ONNX for TensorRT: write, lint, check with NVIDIA's own parser and builder.

A model that needs our plugins gets a decomposed counterpart in ordinary operators, ``model.decomposed.onnx``:
ONNX Runtime and TensorRT-RTX have no plugins, so hosts run and check that one.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import ModelError
from edgedyn.report.rows import Row
from edgedyn.targets import Artifact
from edgedyn.targets.onnx_export import lint_for_tensorrt, write_onnx
from edgedyn.targets.onnxruntime.lower import (
    count_operators,
    describe_models,
    file_name,
    refuse_failing,
    versions,
    write_models,
)
from edgedyn.targets.tensorrt.check import check_build
from edgedyn.targets.tensorrt.nodes import decompose_nodes, has_nodes, with_nodes
from edgedyn.targets.tensorrt.run import decomposed_path, host_path

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def lower(programs: Mapping[str, ExportedProgram], out: Path, precision: str) -> Artifact:
    """Write ``model.onnx``, or one ``<program>.onnx`` each, and decomposed counterparts into ``out``.

    A failed check build does not raise: it is in ``facts["check_build"]``, and its row fails the report.

    Raises:
        ModelError: for an operator that ONNX lacks, a program of another precision, or lint findings;
            where ONNX Runtime cannot load or run the program, with its own line.
    """
    programs = {name: with_nodes(program) for name, program in programs.items()}
    models = write_models(programs, out, precision)
    for name, model in models.items():
        if has_nodes(model):
            write_onnx(decompose_nodes(model), decomposed_path(out / file_name(name)))
        if findings := lint_for_tensorrt(model):
            shown = "\n  ".join(findings[:10])
            raise ModelError(
                f"TensorRT would refuse {file_name(name)} or change its result, {len(findings)} findings:\n  "
                f"{shown}"
            )
    for name, program in programs.items():
        refuse_failing(host_path(out / file_name(name)), program)
    checked = {
        name: {**check_build(host_path(out / file_name(name))), "nodes_decomposed": has_nodes(model)}
        for name, model in models.items()
    }
    facts: dict[str, object] = {
        "onnx": describe_models(models),
        "versions": versions(),
        "check_build": checked if len(programs) > 1 else checked[FORWARD],
    }
    rows = [
        row
        for name, facts_of in checked.items()
        for row in check_rows(facts_of, "" if name == FORWARD else f"[{name}]")
    ]
    return Artifact({name: file_name(name) for name in programs}, facts, tuple(rows))


def preview(programs: Mapping[str, ExportedProgram]) -> dict[str, Any]:
    """Write float programs to a temporary folder and lint them; a finding refuses the whole program."""
    with tempfile.TemporaryDirectory() as folder:
        nodes = {name: with_nodes(program) for name, program in programs.items()}
        models = write_models(nodes, Path(folder), "fp32")
    findings = [finding for model in models.values() for finding in lint_for_tensorrt(model)]
    return {
        "delegated": 0.0 if findings else 1.0,
        "portable": {},
        "operators": count_operators(models.values()),
        "unsupported": dict(Counter(findings)),
    }


def check_rows(checked: dict[str, object], condition: str = "") -> tuple[Row, ...]:
    """Return the rows of a check build; without TensorRT-RTX, one row that fails."""
    failures = f"check_build_failures{condition}"
    if "passed" not in checked:
        return (Row("tensorrt-rtx:onnx", failures, math.nan, {"at_most": 0}, 0),)
    between = f"tensorrt-rtx {checked['version']}:onnx" + ", nodes decomposed" * bool(
        checked["nodes_decomposed"]
    )
    layers = _count(checked["layers"])
    failed = 0.0 if checked["passed"] else 1.0
    rows = [Row(between, failures, failed, {"at_most": 0}, max(layers, 1))]
    for name in ("scratch_bytes", "weights_bytes", "engine_bytes"):
        if checked[name] is not None:
            metric = f"check_build_{name}{condition}"
            rows.append(Row(between, metric, float(_count(checked[name])), {}, layers))
    return tuple(rows)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
