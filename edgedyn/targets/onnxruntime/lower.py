"""Lower a program to ``model.onnx`` for ONNX Runtime."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgedyn.targets import Artifact
from edgedyn.targets.onnx_export import check_precision, describe, export_onnx

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

MODEL_NAME = "model.onnx"


def lower(program: ExportedProgram, out: Path, precision: str) -> Artifact:
    """Write ``model.onnx`` into the folder ``out``.

    Raises:
        ModelError: for what ONNX cannot express, or a program that is not of the precision.
    """
    model = write_model(program, out, precision)
    return Artifact((MODEL_NAME,), {"onnx": describe(model), "versions": versions()})


def write_model(program: ExportedProgram, out: Path, precision: str) -> onnx.ModelProto:
    """Write ``model.onnx``, inputs named as in the program, outputs ``output`` or ``output_i``; return it."""
    signature = program.graph_signature
    outputs = [f"output_{i}" for i in range(len(signature.user_outputs))]
    names = outputs if len(outputs) > 1 else ["output"]
    model = export_onnx(
        program, out / MODEL_NAME, input_names=list(signature.user_inputs), output_names=names
    )
    check_precision(model, precision)
    return model


def versions() -> dict[str, str]:
    """Return the versions of the packages that wrote the file."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript")}
