"""Export a program as one self-contained ONNX file, and check the rules of TensorRT for it.

    float32 or float16 program   the same types; BatchNorm folded into the convolutions
    PT2E-converted INT8 program  QuantizeLinear, DequantizeLinear around float operators, weights as int8

The module imports only the standard library. The one domain beside ONNX's own is ``edgedyn``: our plugins.
Graphs are edited with onnx_ir; ``onnx.ModelProto`` is the finished model: onnx_ir has no checker, and no
serialization to deterministic bytes.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgedyn.errors import ModelError, TargetMissingError

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from torch.export import ExportedProgram

OPSET = 20  # the newest that the parser of TensorRT 10.3 (JetPack 6.1) knows
MAX_BYTES = 2**31 - 1  # a protobuf message cannot be larger; beyond it ONNX needs a second file
PLUGIN_DOMAIN = "edgedyn"


def export_onnx(
    program: ExportedProgram, path: Path, *, input_names: Sequence[str], output_names: Sequence[str]
) -> onnx.ModelProto:
    """Write a program to ``path`` as ONNX and return the model.

    The file has no names of Python files and no line numbers, which the exporter attaches to every node. The
    same program gives the same bytes.

    Args:
        program: fixed shapes; float32, float16, or INT8 from ``convert_pt2e``.
        path: the file; an existing one is replaced.
        input_names: one name per input of the program.
        output_names: one name per output.

    Raises:
        ModelError: for a wrong number of names, an operator that ONNX cannot express, or 2 GB of weights.
        TargetMissingError: where onnx or onnxscript is not installed.
    """
    model = translate(program, input_names, output_names)
    write_onnx(model, path)
    return model


def translate(
    program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]
) -> onnx.ModelProto:
    """Return a program as a checked ONNX model; arguments and errors are those of ``export_onnx``."""
    return to_checked_proto(translate_to_ir(program, input_names, output_names))


def translate_to_ir(
    program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]
) -> onnx_ir.Model:
    """Return a program as an editable ONNX graph; arguments and errors are those of ``export_onnx``."""
    _require_packages()
    _check_names("input", input_names, program.graph_signature.user_inputs)
    _check_names("output", output_names, program.graph_signature.user_outputs)
    graph = _translate(program, list(input_names), list(output_names))
    _store_weights_quantized(graph)
    stored = sum(
        tensor.const_value.nbytes for tensor in graph.graph.initializers.values() if tensor.const_value
    )
    if stored > MAX_BYTES:
        raise ModelError(
            f"the program has {stored} bytes of weights; one ONNX file holds at most {MAX_BYTES}. "
            "Use a smaller network."
        )
    return graph


def to_checked_proto(model: onnx_ir.Model) -> onnx.ModelProto:
    """Serialize a model and run ONNX's own checker on it.

    Raises:
        ModelError: where the checker or its shape inference refuses the model.
    """
    import onnx
    import onnx_ir

    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the exported ONNX is not valid: {error}. This is a defect of the exporter or of a form."
        ) from error
    return proto


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model to ``path``; the same model gives the same bytes."""
    path.write_bytes(model.SerializeToString(deterministic=True))


def check_precision(models: Sequence[onnx.ModelProto], precision: str) -> None:
    """Refuse models of another precision.

    Raises:
        ModelError: with both precisions; ``int8`` needs at least one QuantizeLinear in one model, ``fp16``
            float16 inputs of all.
    """
    import onnx

    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    inputs = {value.type.tensor_type.elem_type for model in models for value in model.graph.input}
    actual = ", ".join(sorted(names.get(kind, onnx.TensorProto.DataType.Name(kind)) for kind in inputs))
    if any(node.op_type == "QuantizeLinear" for model in models for node in model.graph.node):
        actual = "int8"
    if actual != precision:
        raise ModelError(
            f"the program is {actual or 'without inputs'!r}; expected the "
            f"precision {precision!r}. Pass one: .half() before export for fp16, convert_pt2e for int8."
        )


def describe(model: onnx.ModelProto) -> dict[str, object]:
    """Return the facts of an ONNX file: opset, names of inputs and outputs, bytes, count per operator."""
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "opset": max(entry.version for entry in model.opset_import if entry.domain in _ONNX_DOMAINS),
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "bytes": model.ByteSize(),
        "operators": dict(sorted(operators.items())),
    }


def lint_for_tensorrt(model: onnx.ModelProto) -> list[str]:
    """Return one sentence per part of the model that TensorRT refuses or computes differently.

    TensorRT takes explicit signed symmetric INT8 (zero point 0), no INT32 bias behind DequantizeLinear, and
    operators of ONNX or of our plugins. Fixed shapes are our choice: engines then need no profiles.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    findings = []
    for node in model.graph.node:
        if node.domain not in (*_ONNX_DOMAINS, PLUGIN_DOMAIN):
            findings.append(
                f"{_where(node)} is in domain {node.domain!r}; expected ONNX's own or {PLUGIN_DOMAIN!r}. "
                "Use another form."
            )
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            findings += _lint_quantization(node, constants)
    findings += _lint_shapes(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        findings.append(f"the ONNX checker refuses the model: {error}")
    return findings


_ONNX_DOMAINS = ("", "ai.onnx")


def _lint_quantization(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> Iterator[str]:
    """Yield the findings about one QuantizeLinear or DequantizeLinear."""
    import numpy as np
    import onnx

    int8, kind = onnx.TensorProto.INT8, onnx.TensorProto.DataType.Name
    value = constants.get(node.input[0])
    if value is not None and node.op_type == "QuantizeLinear":
        yield f"{_where(node)} quantizes the constant {value.name!r}; expected weights stored as INT8."
    elif value is not None and value.data_type != int8:
        yield (
            f"{_where(node)} reads {value.name!r} of type {kind(value.data_type)}; expected INT8. "
            "Leave biases in float: TensorRT refuses INT32 ones."
        )
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None:
        yield f"{_where(node)} has no constant zero point (the default is uint8); expected INT8 zeros."
    elif zero.data_type != int8 or np.any(onnx.numpy_helper.to_array(zero)):
        yield (
            f"{_where(node)} has zero point {zero.name!r} of type {kind(zero.data_type)}, values "
            f"{sorted(set(onnx.numpy_helper.to_array(zero).flatten().tolist()))[:4]}; expected INT8 zeros. "
            "Quantize with signed symmetric int8."
        )


def _lint_shapes(model: onnx.ModelProto) -> Iterator[str]:
    """Yield each tensor whose declared shape is not fixed."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if any(not dim.HasField("dim_value") for dim in dims):
            shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
            yield f"tensor {value.name!r} has shape {shape}; expected fixed sizes. Export with static shapes."


def _where(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"


def _require_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise TargetMissingError(
                f"exporting ONNX needs the package {package!r}, which is not installed. Install it: "
                f"pip install {package}"
            )


def _check_names(kind: str, names: Sequence[str], expected: Sequence[str]) -> None:
    if len(names) != len(expected) or len(set(names)) != len(names):
        raise ModelError(
            f"the {kind} names are {list(names)}; expected one distinct name for each of the program's "
            f"{len(expected)} {kind}s ({', '.join(map(str, expected))}). Pass as many."
        )


def _translate(program: ExportedProgram, input_names: list[str], output_names: list[str]) -> onnx_ir.Model:
    """Translate a program to ONNX in memory and drop the exporter's notes about Python files."""
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _quiet_exporter():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(
                f"the program cannot be expressed in ONNX opset {OPSET}: {error.__cause__ or error}. Pick a "
                "form of ordinary ops in the recipe."
            ) from error
    assert exported is not None  # only the TorchScript exporter returns None
    ClearMetadataAndDocStringPass()(exported.model)
    return exported.model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence two warnings of torch 2.13 about itself: no torchvision, its own LeafSpec is deprecated."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _store_weights_quantized(model: onnx_ir.Model) -> None:
    """Replace QuantizeLinear of a constant by its int8 result, in place.

    ``convert_pt2e(fold_quantize=False)`` leaves float weights in front of QuantizeLinear, and onnxscript's
    optimizer keeps every QuantizeLinear by default: 621 KB become 157 KB on two convolutions of 128 channels.
    """
    from onnxscript import optimizer

    optimizer.fold_constants(
        model,
        should_fold=lambda node: True if node.op_type == "QuantizeLinear" else None,
        input_size_limit=MAX_BYTES,
        output_size_limit=MAX_BYTES,
    )
    optimizer.remove_unused_nodes(model)
