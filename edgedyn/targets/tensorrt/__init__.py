"""TensorRT on a Jetson: ONNX is written and checked on the host, the engine is built on the device."""

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
    from edgedyn.targets.tensorrt.lower import lower

    return lower(programs, out, precision)


def _preview(programs: Mapping[str, ExportedProgram]) -> dict[str, Any]:
    from edgedyn.targets.tensorrt.lower import preview

    return preview(programs)


def _load(path: Path, program: str = "forward") -> Run:
    from edgedyn.targets.tensorrt.run import load

    return load(path, program)


def _missing() -> str | None:
    """Nothing is missing where either the engine or, as its oracle, the ONNX file can run."""
    found = {
        name: importlib.util.find_spec(name) is not None for name in ("onnxruntime", "tensorrt", "pycuda")
    }
    if found["onnxruntime"] or (found["tensorrt"] and found["pycuda"]):
        return None
    return (
        "neither ONNX Runtime (to run the ONNX on a host) nor TensorRT with pycuda (to run the engine) is "
        "installed. Install one: pip install onnxruntime on a host, pip install 'edgedyn[jetson]' on a Jetson"
    )


TARGET = Target(
    name="tensorrt",
    summary="TensorRT 10 and 11 on Jetson: ONNX here, engine there (fp32, fp16, int8)",
    capabilities=frozenset(),
    precisions=frozenset({"fp32", "fp16", "int8"}),
    int8=Int8Scheme(symmetric=True, outputs=False),
    lower=_lower,
    preview=_preview,
    load=_load,
    missing=_missing,
)
