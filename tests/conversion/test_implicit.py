"""A TensorRT calibration cache and its float ONNX, made of one Q/DQ model.

TensorRT itself is not here, and TensorRT-RTX has no calibrator: what is checked is that the two files fit
each other, the calibration table and the network.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_networks import make_net, make_program

from edgedyn import pipeline
from edgedyn.errors import RecipeError, UsageError
from edgedyn.quantize.table.table import CalibrationTable
from edgedyn.recipe.recipe import Recipe, load_recipe
from edgedyn.targets.onnx_export import export_onnx
from edgedyn.targets.onnxruntime.run import load
from edgedyn.targets.tensorrt.calibration_cache import split_pairs
from edgedyn.targets.tensorrt.check import check_build

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.network=small_networks:small_mallenet", "model.weights=null", "model.arguments={}"]
SMALL += ["input.shape=[1, 3, 32, 48]", "tile.overlap=0", "quantize.keep_float=[]", "quantize.dynamic=[]"]
SMALL += ["quantize.shift=false", "quantize.generated=tensor"]  # generated: so that every convolution is INT8


def recipe(*overrides: str, name: str = "mallenet-s.jetson.int8") -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", [*SMALL, *overrides])


def read_cache(path: Path) -> dict[str, float]:
    head, *lines = path.read_text().splitlines()
    assert head == "TRT-100300-EntropyCalibration2"
    pairs = [line.rsplit(": ", 1) for line in lines]
    return {name: struct.unpack("!f", bytes.fromhex(bits))[0] for name, bits in pairs}


def value_names(model: onnx.ModelProto) -> set[str]:
    return {x.name for x in model.graph.input} | {name for node in model.graph.node for name in node.output}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, CalibrationTable]:
    folder = tmp_path_factory.mktemp("cache")
    table = pipeline.calibrate(recipe(), folder / "table.json", cache=folder / "trt")
    return folder / "trt", table


@pytest.fixture(scope="module")
def model(made) -> onnx.ModelProto:
    return onnx.load(made[0] / "model.onnx")


def test_every_name_of_the_cache_is_a_value_of_the_float_model(made, model):
    scales = read_cache(made[0] / "model.cache")
    assert len(scales) > 10
    assert scales.keys() <= value_names(model)
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.INT8 not in kinds


def test_network_input_and_both_ends_of_every_int8_layer_have_a_scale(made, model):
    scales = read_cache(made[0] / "model.cache")
    readers = {name: node for node in model.graph.node for name in node.input}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 8
    assert model.graph.input[0].name in scales
    for node in convolutions:
        assert node.input[0] in scales
        (written,) = node.output
        fused = readers[written].output[0] if readers[written].op_type in ("Relu", "Clip") else written
        assert fused in scales


def test_scales_are_the_symmetric_steps_of_the_table(made, model):
    scales, entries = read_cache(made[0] / "model.cache"), made[1].programs["forward"]
    steps = {entry.name: entry.symmetric for entry in entries if entry.symmetric}
    assert scales[model.graph.input[0].name] == steps["0.input"]
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    assert scales[first.output[0]] == steps["0.output"]
    assert set(scales.values()) <= set(steps.values())
    assert scales[model.graph.node[-1].input[0]] == steps["3.output"]


def test_float_model_has_the_weights_that_calibration_chose(made, model):
    entries = {entry.name: entry for entry in made[1].programs["forward"]}
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    for name in ("0.weight", "3.weight"):
        codes = made[1].constants[f"forward/{name}"]
        column = np.float32(entries[name].channels).reshape(-1, 1, 1, 1)
        assert any(np.array_equal(array, codes * column) for array in arrays)


def test_float_model_computes_the_network(made):
    _, samples = pipeline.load_sets(recipe())
    x = samples[0].inputs[0]
    with torch.no_grad():
        expected = recipe().load_model()(torch.from_numpy(x)).numpy()
    (y,) = load(made[0] / "model.onnx")(x)
    # 8-bit weights leave about 40 dB; a lost pair or a wrong scale leaves less than 10
    assert 10 * np.log10((expected**2).mean() / ((y - expected) ** 2).mean()) > 30


def test_pairs_are_taken_out_without_a_change_of_the_rest(tmp_path):
    """With weights on their grid already, only the rounding of activations is gone."""
    program, x = make_program("int8")
    model = export_onnx(program, tmp_path / "qdq.onnx", input_names=["x"], output_names=["y"])
    before = model.SerializeToString(deterministic=True)
    made, scales = split_pairs(model)
    assert model.SerializeToString(deterministic=True) == before
    (tmp_path / "float.onnx").write_bytes(made.SerializeToString())
    net = make_net()
    with torch.no_grad():
        for layer in (net.head, net.body, net.tail):
            step = layer.weight.flatten(1).abs().amax(1)[:, None, None, None] / 127
            layer.weight.copy_((layer.weight / step).round() * step)
        expected = net(x).numpy()
    (y,) = load(tmp_path / "float.onnx")(x.numpy())
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)  # 200 float32 additions around 1
    assert len(scales) == 3
    assert {node.op_type for node in made.graph.node} == {"Conv", "PRelu", "Add"}


def test_quantized_output_keeps_its_name(made, model):
    assert [value.name for value in model.graph.output] == ["output"]
    last = model.graph.node[-1]
    assert (last.op_type, list(last.output)) == ("Identity", ["output"])
    assert last.input[0] in read_cache(made[0] / "model.cache")


def test_kept_layers_have_no_scale_of_their_own(tmp_path):
    given = recipe('quantize.keep_float=["0", "1.*"]', "quantize.rounding=nearest")
    table = pipeline.calibrate(given, tmp_path / "table.json", cache=tmp_path / "trt")
    scales = read_cache(tmp_path / "trt/model.cache")
    steps = {entry.name: entry.symmetric for entry in table.programs["forward"]}
    assert sorted(scales.values()) == sorted(steps[name] for name in ("1.pwconv.output", "3.output"))


@pytest.mark.tensorrt_rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra tensorrt-check")
def test_parser_and_builder_of_tensorrt_take_the_float_model(made):
    facts = check_build(made[0] / "model.onnx")
    assert facts["passed"], facts["messages"]


def test_routed_network_has_a_pair_of_files_for_each_program_and_no_old_ones(tmp_path):
    given = recipe("model.network=small_networks:small_routed", "quantize.rounding=nearest")
    (tmp_path / "trt").mkdir()
    for name in ("router.cache", "narrow.cache", "narrow.onnx"):
        (tmp_path / "trt" / name).write_bytes(b"old")
    pipeline.calibrate(given, tmp_path / "table.json", cache=tmp_path / "trt", force=True)
    files = {path.name for path in (tmp_path / "trt").iterdir()}
    assert files == {"router.onnx", "narrow.onnx", "narrow.cache", "wide.onnx", "wide.cache"}
    scales = {path.stem: read_cache(path) for path in (tmp_path / "trt").glob("*.cache")}
    for name, found in scales.items():
        assert len(found) == 3
        assert found.keys() <= value_names(onnx.load(tmp_path / f"trt/{name}.onnx"))
    assert scales["narrow"] != scales["wide"]


@pytest.mark.parametrize(
    ("name", "override"),
    [("mallenet-s.phone.int8", "name=phone"), ("mallenet-s.jetson.int8", "kernels=fused")],
)
def test_recipe_without_calibration_cache_is_refused_before_any_work(tmp_path, name, override):
    with pytest.raises(RecipeError, match=r"cache is for target tensorrt with stock kernels.*Jetson recipe"):
        pipeline.calibrate(recipe(override, name=name), tmp_path / "t.json", cache=tmp_path / "trt")
    assert list(tmp_path.iterdir()) == []


def test_shifted_activations_are_refused_for_a_cache_before_any_work(tmp_path):
    with pytest.raises(
        RecipeError, match=r"quantize\.shift: true; expected false.*--set quantize\.shift=false"
    ):
        pipeline.calibrate(recipe("quantize.shift=true"), tmp_path / "t.json", cache=tmp_path / "trt")
    assert list(tmp_path.iterdir()) == []


def test_place_that_is_taken_is_refused_before_any_work(tmp_path):
    (tmp_path / "trt").mkdir()
    (tmp_path / "trt/model.onnx").write_bytes(b"of someone")
    with pytest.raises(UsageError, match=r"trt is not empty.*--force"):
        pipeline.calibrate(recipe(), tmp_path / "t.json", cache=tmp_path / "trt")
    with pytest.raises(UsageError, match="is no folder"):
        pipeline.calibrate(recipe(), tmp_path / "t.json", cache=tmp_path / "trt/model.onnx")
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == '["trt"]'
