"""Lower programs to ONNX for ONNX Runtime."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import ModelError
from edgedyn.graph.nodes import module_path
from edgedyn.targets import Artifact
from edgedyn.targets.onnx_export import check_precision, describe, export_onnx
from edgedyn.targets.onnxruntime.run import load, runtime_name
from edgedyn.targets.trial import find_refusal

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

_SHOWN = 4  # lines of a runtime that ended


def lower(programs: Mapping[str, ExportedProgram], out: Path, precision: str) -> Artifact:
    """Write ``model.onnx``, or ``<program>.onnx`` for each of several, into the folder ``out``.

    Raises:
        ModelError: for an operator that ONNX cannot express, a program of another precision, or one that ONNX
            Runtime cannot load or run, with its own line.
    """
    models = write_models(programs, out, precision)
    for name, program in programs.items():
        refuse_failing(out / file_name(name), program)
    facts: dict[str, object] = {"onnx": describe_models(models), "versions": versions()}
    return Artifact({name: file_name(name) for name in programs}, facts)


def refuse_failing(path: Path, program: ExportedProgram) -> None:
    """Remove a file, and refuse its program, that ONNX Runtime cannot load or run on its example inputs.

    Args:
        path: an ONNX file in ordinary operators.
        program: as it was before lowering, for its example inputs and its layers.

    Raises:
        ModelError: with ONNX Runtime's own line, and the layer of the node that it names.
        TargetMissingError: where ONNX Runtime is not installed.
    """
    assert program.example_inputs is not None  # torch.export keeps them
    runtime_name(path)  # refuses where ONNX Runtime is not installed
    if refusal := find_refusal("onnxruntime", path, FORWARD, [x.numpy() for x in program.example_inputs[0]]):
        path.unlink()
        # its exceptions repeat the lines that it wrote
        words = [*refusal.log[-_SHOWN:], refusal.words] if refusal.has_ended else [refusal.words]
        line = " ".join("; ".join(words).split())
        raise ModelError(f"{_quote(line)} {_place(line, program)}")


def _quote(line: str) -> str:
    return line if line.startswith("ONNX Runtime") else f"ONNX Runtime cannot run the program: {line}."


def _place(line: str, program: ExportedProgram) -> str:
    """Return the next step: the layers of the nodes that a line names, or those in INT8."""
    # a name stands behind node_, in quotes or in brackets; "add" in a sentence is none
    words = {name.removeprefix("node_") for name in re.findall(r"(?:\bnode_|['\"(])(\w+)", line)}
    nodes = [n for n in program.graph.nodes if n.name in words and n.op == "call_function"]
    layers = dict.fromkeys(path for node in nodes if (path := module_path(node)))
    if not layers:
        return "Keep layers in float (quantize.keep_float), or write them with other operators."
    return f"Keep the layer in float, quantize.keep_float: [{', '.join(layers)}], or write it with others."


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
