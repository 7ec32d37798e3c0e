"""Lower programs to ONNX for ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import ModelError
from edgedyn.targets import Artifact
from edgedyn.targets.onnx_export import check_precision, describe, export_onnx
from edgedyn.targets.onnxruntime.run import load

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram


def lower(programs: Mapping[str, ExportedProgram], out: Path, precision: str) -> Artifact:
    """Write ``model.onnx``, or ``<program>.onnx`` for each of several, into the folder ``out``.

    Raises:
        ModelError: for an operator that ONNX cannot express, or a program of another precision.
    """
    models = write_models(programs, out, precision)
    facts: dict[str, object] = {"onnx": describe_models(models), "versions": versions()}
    return Artifact({name: file_name(name) for name in programs}, facts)


def preview(programs: Mapping[str, ExportedProgram]) -> dict[str, Any]:
    """Write float programs to a temporary folder and load them; ``unsupported`` counts refusals."""
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(programs, Path(folder), "fp32")
        unsupported = Counter[str]()
        for name in programs:
            try:
                load(Path(folder) / file_name(name))
            except ModelError as error:
                unsupported[str(error)] += 1
    return {
        "delegated": 1.0,
        "portable": {},
        "operators": count_operators(models.values()),
        "unsupported": dict(unsupported),
    }


def describe_models(models: Mapping[str, onnx.ModelProto]) -> dict[str, Any]:
    """Return the facts of the one file, or of several {program: facts}."""
    described = {name: describe(model) for name, model in models.items()}
    return described.get(FORWARD, described)


def count_operators(models: Iterable[onnx.ModelProto]) -> dict[str, int]:
    """Count the ONNX operators of several models by type."""
    return dict(sorted(Counter(node.op_type for model in models for node in model.graph.node).items()))


def file_name(program: str) -> str:
    """Return the file of a program."""
    return "model.onnx" if program == FORWARD else f"{program}.onnx"


def write_models(
    programs: Mapping[str, ExportedProgram], out: Path, precision: str
) -> dict[str, onnx.ModelProto]:
    """Write one file per program, with an output ``output``, or several ``output_i``; return the models.

    A routed INT8 program may have parts that are float as a whole, for instance its gate.
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
