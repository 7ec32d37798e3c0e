"""Networks of strangers, built in INT8 through the real runtimes: the layers in INT8, the measured rows."""

from __future__ import annotations

import pytest
import strangers
import torch
from PIL import Image
from small_sets import waves

import edgedyn
from edgedyn import pipeline
from edgedyn.errors import ModelError
from edgedyn.recipe.recipe import Recipe


def on(kinds, jetson: str):
    """Return every kind on the phone, and one on ONNX Runtime, which runs the file of a Jetson."""
    return [*((kind, "executorch") for kind in kinds), (jetson, "onnxruntime")]


EXACT = 1e-12


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("calibration", "validation")):
        (folder / name).mkdir()
        for seed in range(2):
            Image.fromarray(waves(seed + 2 * number)).save(folder / name / f"{seed}.png")
    return folder


def build(photos, out, network: str, target: str, **arguments):
    recipe = Recipe(
        name="stranger",
        model={"network": f"strangers:{network}", "arguments": arguments},
        input={"shape": [1, 3, 32, 32]},
        tile={"overlap": 4},
        target=target,
        precision="int8",
        calibration=str(photos / "calibration"),
        validation=str(photos / "validation"),
        noise={"sigma": [25.0], "clip": False},
    )
    built = pipeline.build(recipe, out / "bundle", trust=True)
    rows = {(row.between, row.metric): row.value for row in built.report.rows}
    assert rows["decomposed:canonical", "max_relative[float64]"] <= EXACT
    assert rows["quantized:decomposed", "residual_sqnr_db"] > 25
    assert rows["device:quantized", "noise_ratio"] == pytest.approx(1, abs=0.1)
    return built.bundle.manifest["facts"]


def float_layers(facts) -> dict[str, str]:
    return {row["node"]: row["reason"] for row in facts["float_nodes"] if row["node"].startswith("body")}


@pytest.mark.parametrize(("kind", "target"), on(strangers.MIXES, "by_sample"))
def test_mixes_of_kernels_are_int8(photos, tmp_path, kind, target):
    facts = build(photos, tmp_path, "dynamic", target, kind=kind)
    kept = float_layers(facts)
    static = "no INT8 rule for this operator"  # of XNNPACK and TensorRT for these convolutions
    assert kept == ({"body.2": static} if kind in ("transposed", "rows") else {})
    assert facts["dynamic_layers"] == ["body.2"]


@pytest.mark.parametrize(("kind", "target"), on(strangers.FLOAT, "modulated"))
def test_layer_with_a_weight_from_data_stays_float_with_the_reason(photos, tmp_path, kind, target):
    facts = build(photos, tmp_path, "dynamic", target, kind=kind)
    assert float_layers(facts) == {
        "body.2": "its weight is computed from the image: runtimes keep only stored weights in INT8"
    }
    assert 0 < facts["int8_mac_share"] < 1
    assert facts["dynamic_layers"] == ["body.2"]


@pytest.mark.parametrize(("kind", "target"), on(strangers.FOLDED, "standardized"))
def test_weight_from_parameters_alone_is_int8(photos, tmp_path, kind, target):
    facts = build(photos, tmp_path, "folded", target, kind=kind)
    assert float_layers(facts) == {}
    assert facts["int8_mac_share"] == 1
    assert facts["dynamic_layers"] == []


@pytest.mark.parametrize(("kind", "target"), on(["weight_norm", "pruned"], "weight_norm"))
def test_normed_weight_is_int8(photos, tmp_path, kind, target):
    facts = build(photos, tmp_path, "normed", target, kind=kind)
    assert float_layers(facts) == {}
    assert facts["int8_mac_share"] == 1


@pytest.mark.parametrize(("kind", "target"), on(strangers.TYPED, "blur"))
def test_network_that_names_float32_is_checked_in_float64(photos, tmp_path, kind, target):
    facts = build(photos, tmp_path, "typed", target, kind=kind)
    assert float_layers(facts) == {}
    assert facts["int8_mac_share"] == 1


def test_network_that_only_runs_in_float32_is_refused_with_its_line(photos, tmp_path):
    with pytest.raises(ModelError, match=r"runs in float32 and not in float64.*expected float32.*strangers"):
        build(photos, tmp_path, "OnlyFloat32", "onnxruntime")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("Open", r"index.* makes a tensor or a number of the image's own size \(at .*y\[y > 0\]"),
        ("vectorised", r"cannot follow its own program: RuntimeError.*\(at .*torch.vmap\(self.mix"),
        ("spectrum", r"cannot run mul.* of complex numbers.*mul of shape .* in body.2 "),
    ],
)
def test_network_without_a_program_is_refused_before_an_image_is_read(
    photos, tmp_path, monkeypatch, network, message
):
    def refuse(*arguments, **options):
        raise AssertionError("an image is read")

    monkeypatch.setattr(pipeline, "draw", refuse)
    with pytest.raises(ModelError, match=message):
        build(photos, tmp_path, network, "executorch")


def test_decision_on_a_number_of_the_image_is_measured(photos, tmp_path):
    build(photos, tmp_path, "Brightness", "executorch")


@pytest.mark.parametrize(("kind", "target"), on(strangers.IDLE, "attention_layer"))
def test_operators_that_draw_no_number_in_evaluation_mode_are_built(photos, tmp_path, kind, target):
    build(photos, tmp_path, "idle", target, kind=kind)


@pytest.mark.parametrize(("kind", "target"), on(strangers.PADDED, "even_same"))
def test_convolution_is_int8_however_it_pads(photos, tmp_path, kind, target):
    facts = build(photos, tmp_path, "padded", target, kind=kind)
    assert float_layers(facts) == {}
    assert facts["int8_mac_share"] == 1


def test_padding_keeps_every_value():
    from edgedyn.conversion.capture import capture

    for kind in strangers.PADDED:
        net, x = strangers.padded(kind).double().eval(), torch.rand(1, 3, 11, 9, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(capture(net, (x,)).module()(x), net(x), rtol=1e-12, atol=1e-13)


def test_malleconv_with_a_stride_is_built(photos, tmp_path):
    facts = build(photos, tmp_path, "strided_malleconv", "executorch")
    assert facts["dynamic_layers"] == ["body.2.0"]


@pytest.mark.parametrize(
    ("stays", "message"), [(True, "training mode"), (False, r"random numbers .*dropout.* \(at .*F\.dropout")]
)
def test_network_in_training_mode_is_refused_by_build_and_inspect(photos, tmp_path, stays, message):
    with pytest.raises(ModelError, match=message):
        build(photos, tmp_path, "Forgetful", "onnxruntime", stays=stays)
    with pytest.raises(ModelError, match=message):
        edgedyn.inspect(strangers.Forgetful(stays=stays).eval(), shape=(1, 3, 16, 16))
