"""ONNX Runtime on the host's CPU, unoptimized: the oracle for every program that is shipped as ONNX."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.targets import Artifact, Int8Scheme, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from edgedyn.targets import Run


def _lower(programs: Mapping[str, ExportedProgram], out: Path, precision: str) -> Artifact:
    from edgedyn.targets.onnxruntime.lower import lower

    return lower(programs, out, precision)


def _preview(programs: Mapping[str, ExportedProgram]) -> dict[str, Any]:
    from edgedyn.targets.onnxruntime.lower import preview

    return preview(programs)


def _load(path: Path, program: str = "forward") -> Run:
    from edgedyn.targets.onnxruntime.run import load

    return load(path, program)


def _missing() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed. Install it: pip install onnxruntime"
    return None


TARGET = Target(
    name="onnxruntime",
    summary="ONNX on the host's CPU, unoptimized: the oracle (fp32, fp16, int8)",
    capabilities=frozenset(),
    precisions=frozenset({"fp32", "fp16", "int8"}),
    int8=Int8Scheme(symmetric=True, outputs=False),
    lower=_lower,
    preview=_preview,
    load=_load,
    missing=_missing,
)
