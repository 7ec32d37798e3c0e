"""The onnxruntime target and the ONNX export that it shares with TensorRT."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from small_models import run_with_blocked, save_model
from small_networks import capture, make_input, make_net, make_program, quantize, sum_of_terms
from torch import Tensor, nn

from edgedyn import targets
from edgedyn.errors import BundleError, ModelError, TargetMissingError, UsageError
from edgedyn.layers.malleconv import AffineMalleConv
from edgedyn.models.mallenet import MalleNet
from edgedyn.targets import onnx_export
from edgedyn.targets.onnxruntime import run as onnxruntime_run

TARGET = targets.load("onnxruntime")


def lower(program, folder, precision):
    return TARGET.lower({"forward": program}, folder, precision)


FLOAT16_UNIT = 2.0**-11  # largest relative error of one rounding to float16
FLOAT32_UNIT = 2.0**-24


@pytest.mark.parametrize(
    ("precision", "unit", "roundings"),
    # float32: each of the 3*9 + 8*9 + 8 products of a pixel, their sums, and 6 elementwise steps round once
    # float16: ONNX Runtime computes in float32 and rounds the outputs of the 6 operators
    [("fp32", FLOAT32_UNIT, 2 * (27 + 72 + 8) + 6), ("fp16", FLOAT16_UNIT, 6)],
)
def test_onnx_equals_the_network_in_float64(tmp_path, precision, unit, roundings):
    program, x = make_program(precision)
    artifact = lower(program, tmp_path, precision)
    (y,) = TARGET.load(tmp_path / artifact.programs["forward"])(x.numpy())
    net = make_net().half().double() if precision == "fp16" else make_net().double()
    with torch.no_grad():
        error = (torch.from_numpy(y).double() - net(x.double())).abs()
    assert y.dtype == x.numpy().dtype
    assert (error <= roundings * unit * sum_of_terms(net, x)).all(), error.max()


def test_int8_onnx_equals_the_converted_program_within_one_step(tmp_path):
    program, x = make_program("int8")
    lower(program, tmp_path, "int8")
    (y,) = TARGET.load(tmp_path / "model.onnx")(x.numpy())
    with torch.no_grad():
        expected = program.module()(x)
    # torch multiplies by 1 / scale and ONNX divides: a tie may fall to the neighbour in the last quantizer
    last_step = [n.args[1] for n in program.graph.nodes if "quantize_per_tensor" in n.name][-1]
    weight = make_net().tail.weight.detach().flatten(1).abs().sum(1).max().item()
    assert np.abs(y - expected.numpy()).max() <= last_step * weight
    with torch.no_grad():
        assert (expected - make_net()(x)).abs().max() > 1e-4  # it was quantized at all


@pytest.mark.parametrize("fold_quantize", [True, False])
def test_int8_weights_are_stored_as_int8(tmp_path, fold_quantize):
    program = quantize(make_net(64), make_input(), fold_quantize=fold_quantize)
    lower(program, tmp_path, "int8")
    model = onnx.load(tmp_path / "model.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    producers = {name: node for node in model.graph.node for name in node.output}
    stored = [producers[node.input[1]].input[0] for node in convolutions]
    assert len(stored) == 3
    assert {constants[name].data_type for name in stored} == {TensorProto.INT8}
    weights = 64 * (3 * 9 + 64 * 9 + 3)
    assert (
        tmp_path / "model.onnx"
    ).stat().st_size < 1.5 * weights  # bytes; float32 weights alone would be 4 times


def test_file_is_deterministic_complete_and_does_not_name_python_files(tmp_path):
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        lower(capture(make_net(), make_input()), folder, "fp32")
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]
        contents.append((folder / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    assert b".py" not in contents[0]


def test_facts_describe_the_file(tmp_path):
    artifact = lower(make_program("int8")[0], tmp_path, "int8")
    facts = artifact.facts["onnx"]
    assert facts["opset"] == onnx_export.OPSET
    assert facts["inputs"] == ["x"]
    assert facts["outputs"] == ["output"]
    assert facts["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert facts["operators"]["QuantizeLinear"] == 3
    assert facts["operators"]["DequantizeLinear"] == 6
    assert artifact.facts["versions"]["torch"] == torch.__version__


def test_several_inputs_and_outputs_keep_their_order(tmp_path):
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return left - right, left * right.sum(1, keepdim=True)

    x, y = make_input(), make_input() + 2
    artifact = lower(torch.export.export(Two(), (x, y)), tmp_path, "fp32")
    assert artifact.facts["onnx"]["inputs"] == ["left", "right"]
    assert artifact.facts["onnx"]["outputs"] == ["output_0", "output_1"]
    difference, product = TARGET.load(tmp_path / "model.onnx")(x.numpy(), y.numpy())
    np.testing.assert_array_equal(difference, (x - y).numpy())
    np.testing.assert_allclose(product, (x * y.sum(1, keepdim=True)).numpy(), rtol=4 * FLOAT32_UNIT)


def test_plugin_node_of_a_form_passes_the_export(tmp_path):
    class Plugin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            attributes = {"plugin_version": "1", "plugin_namespace": "edgedyn"}
            return torch.onnx.ops.symbolic(
                "edgedyn::Twice", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1
            )

    program = capture(Plugin(), make_input())
    model = onnx_export.export_onnx(program, tmp_path / "m.onnx", input_names=["x"], output_names=["y"])
    assert [(node.domain, node.op_type) for node in model.graph.node] == [("edgedyn", "Twice")]
    assert onnx_export.lint_for_tensorrt(model) == []
    with pytest.raises(ModelError, match=r"(?s)cannot run m\.onnx.*Twice"):
        TARGET.load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ("fp32", "fp16", "the program is 'fp32'; expected the precision 'fp16'"),
        ("fp32", "int8", "is 'fp32'"),
        ("fp16", "fp32", "is 'fp16'"),
        ("int8", "fp32", "is 'int8'"),
    ],
)
def test_program_of_another_precision_is_refused(tmp_path, made, asked, message):
    with pytest.raises(ModelError, match=message):
        lower(make_program(made)[0], tmp_path, asked)


@pytest.mark.parametrize(
    ("input_names", "output_names", "message"),
    [
        (["a", "b"], ["y"], r"input names are \['a', 'b'\]; expected .* 1 inputs \(x\)"),
        (["a"], [], "1 outputs"),
    ],
)
def test_wrong_number_of_names_is_refused(tmp_path, input_names, output_names, message):
    program = capture(make_net(), make_input())
    with pytest.raises(ModelError, match=message):
        onnx_export.export_onnx(
            program, tmp_path / "m.onnx", input_names=input_names, output_names=output_names
        )


def test_operator_without_onnx_is_named(tmp_path):
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).abs()

    program = capture(Spectrum(), torch.rand(2, 4, 4))
    with pytest.raises(ModelError, match=r"(?s)cannot be expressed in ONNX opset 20.*linalg_eig"):
        lower(program, tmp_path, "fp32")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_one_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="one ONNX file holds at most 1000"):
        lower(capture(make_net(), make_input()), tmp_path, "fp32")


def test_session_does_not_optimize(tmp_path):
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    import onnxruntime as ort

    options = onnxruntime_run._open_session(path).get_session_options()
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.intra_op_num_threads == 2
    assert onnxruntime_run.runtime_name(path) == f"ONNX Runtime {ort.__version__}, unoptimized"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], r"got 0 arrays; expected 1: \['x'\]"),
        ([np.zeros((1, 2))], r"'x' got float64 \(1, 2\); expected float32 \(1, 2\)"),
        ([np.zeros((1, 3), np.float32)], r"got float32 \(1, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    run = TARGET.load(save_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])]))
    with pytest.raises(UsageError, match=message):
        run(*arrays)


@pytest.mark.parametrize("content", [None, b"not a model at all"])
def test_file_that_is_not_onnx_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"m\.onnx cannot be read as ONNX"):
        TARGET.load(tmp_path / "m.onnx")


def test_missing_package_is_a_sentence_not_an_exception(tmp_path, monkeypatch):
    assert TARGET.missing() is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # Python's own way to make an import fail
    assert "pip install onnxruntime" in TARGET.missing()
    with pytest.raises(TargetMissingError, match="pip install onnxruntime"):
        TARGET.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_export_without_its_packages_says_what_to_install(tmp_path, monkeypatch, package):
    program = capture(make_net(), make_input())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TargetMissingError, match=f"pip install {package}$"):
        lower(program, tmp_path, "fp32")


def test_target_imports_with_everything_heavy_blocked():
    blocked = ["torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda"]
    code = "from edgedyn import targets; print(targets.load('onnxruntime').missing())"
    assert "onnxruntime is not installed" in run_with_blocked(blocked, code)


def test_device_side_runs_without_torch_and_onnx(tmp_path):
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])])
    code = f"""
import numpy as np
from pathlib import Path
from edgedyn import targets
(y,) = targets.load("onnxruntime").load(Path({str(path)!r}))(np.array([[1.5, -2]], np.float32))
print(y.tolist())
"""
    assert run_with_blocked(["torch", "onnx", "onnxscript"], code).strip() == "[[-1.5, 2.0]]"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: AffineMalleConv(3, 4, 3), id="layer"),
        pytest.param(lambda: MalleNet(2), id="network", marks=pytest.mark.slow),
    ],
)
def test_dynamic_layers_keep_their_accuracy(tmp_path, make):
    torch.manual_seed(7)
    net = make().eval()
    for parameter in net.parameters():  # every gate starts at 0, which would hide the dynamic layers
        parameter.data += 0.05 * torch.randn(parameter.shape)
    x = make_input((1, 3, 32, 64))
    lower(capture(net, x), tmp_path, "fp32")
    (y,) = TARGET.load(tmp_path / "model.onnx")(x.numpy())
    with torch.no_grad():
        in_float32, expected = net(x), net.double()(x.double())
        for name, parameter in net.named_parameters():
            if name.endswith("gate"):
                parameter.zero_()
        without_gates = net(x.double())
    # the same products summed in another order: an error of torch's own size, within a factor for the maximum
    allowed = 4 * (in_float32 - expected).abs().max().item()
    assert np.abs(y - expected.numpy()).max() <= allowed
    assert (without_gates - expected).abs().max() > 100 * allowed  # the layer under test takes part
