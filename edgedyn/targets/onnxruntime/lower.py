"""Lower programs to ONNX for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgedyn.manifest import FORWARD
from edgedyn.targets import Artifact
from edgedyn.targets.onnx_export import check_precision, describe, export_onnx

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram


def lower(programs: Mapping[str, ExportedProgram], out: Path, precision: str) -> Artifact:
    """Write ``model.onnx``, or ``<program>.onnx`` for each of several, into the folder ``out``.

    Raises:
        ModelError: for what ONNX cannot express, or a program that is not of the precision.
    """
    models = write_models(programs, out, precision)
    facts = {"onnx": {name: describe(model) for name, model in models.items()}, "versions": versions()}
    return Artifact({name: file_name(name) for name in programs}, facts)


def file_name(program: str) -> str:
    """Return the file of a program."""
    return "model.onnx" if program == FORWARD else f"{program}.onnx"


def write_models(
    programs: Mapping[str, ExportedProgram], out: Path, precision: str
) -> dict[str, onnx.ModelProto]:
    """Write a file a program, inputs named as in it, outputs ``output`` or ``output_i``; return the models.

    A routed INT8 program may have parts that are float whole, for instance its gate.
    """
    models = {}
    for name, program in programs.items():
        signature = program.graph_signature
        outputs = [f"output_{i}" for i in range(len(signature.user_outputs))]
        names = outputs if len(outputs) > 1 else ["output"]
        models[name] = export_onnx(
            program, out / file_name(name), input_names=list(signature.user_inputs), output_names=names
        )
    check_precision(list(models.values()), precision)
    return models


def versions() -> dict[str, str]:
    """Return the versions of the packages that wrote the file."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript")}
