"""Lower a program to ``model.onnx`` for TensorRT: write, lint, let NVIDIA's own parser and builder try it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgedyn.errors import ModelError
from edgedyn.targets import Artifact
from edgedyn.targets.onnx_export import describe, lint_for_tensorrt
from edgedyn.targets.onnxruntime.lower import MODEL_NAME, versions, write_model
from edgedyn.targets.tensorrt.check import check_build
from edgedyn.validate import Row

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def lower(program: ExportedProgram, out: Path, precision: str) -> Artifact:
    """Write ``model.onnx`` into the folder ``out``.

    A failed check build does not raise: ``facts["check_build"]`` says it, and the report fails by its row.

    Raises:
        ModelError: for what ONNX cannot express, a program that is not of the precision, or lint findings.
    """
    model = write_model(program, out, precision)
    findings = lint_for_tensorrt(model)
    if findings:
        shown = "\n  ".join(findings[:10])
        raise ModelError(
            f"TensorRT would refuse this ONNX or change its result, {len(findings)} findings:\n  {shown}"
        )
    checked = check_build(out / MODEL_NAME)
    facts = {"onnx": describe(model), "versions": versions(), "check_build": checked}
    return Artifact((MODEL_NAME,), facts, check_rows(checked))


def check_rows(checked: dict[str, object]) -> tuple[Row, ...]:
    """Turn the facts of a check build into rows; where TensorRT-RTX is not installed, one that fails."""
    if "passed" not in checked:
        return (Row("tensorrt-rtx:onnx", "check_build_failures", math.nan, {"at_most": 0}, 0),)
    between = f"tensorrt-rtx {checked['version']}:onnx"
    layers = _count(checked["layers"])
    rows = [
        Row(
            between, "check_build_failures", 0.0 if checked["passed"] else 1.0, {"at_most": 0}, max(layers, 1)
        )
    ]
    for name in ("scratch_bytes", "weights_bytes", "engine_bytes"):
        if checked[name] is not None:
            rows.append(Row(between, f"check_build_{name}", float(_count(checked[name])), {}, layers))
    return tuple(rows)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
