"""What goes into a bundle beside its program, from measurements made up to discriminate."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgedyn import contents
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.conversion.convert import Converted, Part
from edgedyn.images.image_set import open_set
from edgedyn.images.sample import Sample
from edgedyn.quantize import Quantized
from edgedyn.quantize.observe.histogram import Histogram
from edgedyn.quantize.table.entries import Entry
from edgedyn.quantize.table.table import CalibrationTable
from edgedyn.recipe.recipe import load_recipe
from edgedyn.report.rows import Row, ValidationReport
from edgedyn.targets import Artifact
from edgedyn.validation.runs import Outputs

RECIPE = Path(__file__).parents[1] / "recipes/mallenet-s.phone.int8.yaml"


CONVERTED = Converted(None, {"forward": Part((), {}, None, Quantized(None), None)}, None, None)


def make_outputs(*samples: tuple[float, str], device_error: float = 0.0) -> Outputs:
    """Give each (sigma, source) an image of its own value; at one pixel the device is off by an error."""
    made, images = [], []
    for index, (sigma, source) in enumerate(samples):
        image = np.full((1, 3, 4, 6), index / 8, np.float32)
        made.append(Sample((image,), image, sigma, source))
        images.append(image)
    device = [image.copy() for image in images]
    for image in device:
        image[0, 0, 1, 2] += device_error
    spec = TensorSpec("output", "float32", (1, 3, 4, 6), "")
    returned = {name: [[y] for y in ys] for name, ys in (("quantized", images), ("device", device))}
    return Outputs(made, images, images, device, specs=(spec,), returned=returned)


def describe(outputs: Outputs, *overrides: str, ok: bool = True, converted: Converted = CONVERTED) -> dict:
    recipe = load_recipe(RECIPE, [*overrides])
    calibration = open_set(recipe.path(recipe.calibration))
    artifact = Artifact({"forward": "model.pte"}, {"delegates": 1})
    return contents.describe(recipe, artifact, converted, calibration, outputs, {}, ok)


@pytest.mark.parametrize(("short_side", "fact"), [("null", None), ("128", 128)])
def test_preprocessing_of_the_calibration_set_is_a_fact(tmp_path, short_side, fact):
    recipe = load_recipe(RECIPE)
    text = recipe.path(recipe.calibration).read_text(encoding="utf-8")
    (tmp_path / "set.yaml").write_text(f"{text}short_side: {short_side}\n", encoding="utf-8")
    facts = describe(make_outputs((15, "a")), f"calibration={tmp_path / 'set.yaml'}")["facts"]
    assert facts["calibration"].get("short_side") == fact


def test_spread_of_generated_kernels_is_named_by_program():
    seen = Histogram.of(np.ones(3))
    kernel = Entry("level.output", "kernel", seen, "minmax", (0.1, 0), 0.1, spread=(0.5, 0.25))
    entries = (Entry("level.input", "feature", seen, "minmax", (0.1, 0), 0.1), kernel)
    for name, expected in (("forward", "level.output"), ("wide", "wide: level.output")):
        converted = replace(CONVERTED, table=CalibrationTable({}, {}, {name: entries}))
        facts = describe(make_outputs((15, "a")), converted=converted)["facts"]
        assert facts["generated_kernels"] == {expected: {"spread": 0.5, "between_images": 0.25}}
    assert describe(make_outputs((15, "a")))["facts"]["generated_kernels"] == {}


def test_pictures_show_each_noise_level_and_different_images():
    outputs = make_outputs((50, "a"), (15, "a"), (15, "b"), (25, "b"), (25, "c"))
    shown = [(picture.sigma, picture.caption) for picture in contents.choose_pictures(outputs)]
    assert shown == [(15, "b"), (25, "c"), (50, "a")]


def test_first_image_of_a_noise_level_is_shown():
    outputs = make_outputs((15, "a"), (15, "b"))
    assert [picture.caption for picture in contents.choose_pictures(outputs)] == ["a"]


def test_noise_level_of_an_image_that_is_shown_already_is_shown_too():
    outputs = make_outputs((50, "a"), (15, "a"))
    assert [picture.sigma for picture in contents.choose_pictures(outputs)] == [15, 50]


@pytest.mark.parametrize(("device_error", "levels"), [(0.0, 0.25), (1 / 255, 2.0)])
def test_vectors_allow_twice_what_this_runtime_was_off_and_a_quarter_level_at_least(device_error, levels):
    vectors = describe(make_outputs((15, "a"), (50, "b"), device_error=device_error))["vectors"]
    assert [vector["inputs"] for vector in vectors] == [
        ["vectors/first.input.npy"],
        ["vectors/noisiest.input.npy"],
    ]
    # the error is added to a float32 value below 1: one rounding of 2**-24
    assert [limit * 255 for vector in vectors for limit in vector["max_abs"]] == pytest.approx(
        [levels] * 2, abs=255 * 2 * 2**-24
    )
    # 1 of 72 values is off
    assert [limit * 255 for vector in vectors for limit in vector["rms"]] == pytest.approx(
        [max(levels / 72**0.5, 1 / 16) if device_error else 1 / 16] * 2, rel=1e-5
    )


def test_least_limits_of_a_vector_are_in_units_of_its_output():
    outputs = make_outputs((15, "a"))
    wide = replace(outputs, specs=(replace(outputs.specs[0], range=(0.0, 255.0)),))
    for made, unit in ((outputs, 1), (wide, 255)):
        (limit,) = describe(made)["vectors"][0]["max_abs"]
        assert limit == pytest.approx(unit / 255 / 4)


@pytest.mark.parametrize("ok", [True, False])
def test_manifest_carries_the_verdict(ok):
    assert describe(make_outputs((15, "a")), ok=ok)["ok"] is ok


@pytest.mark.parametrize(
    ("mismatch", "forced"), [("", None), ("a table of another graph", "a table of another graph")]
)
def test_method_of_calibration_is_named_and_what_was_forced(mismatch, forced):
    overrides = ["quantize.rounding=nearest", "quantize.bias_correction=full", "quantize.ranges.feature=mse"]
    facts = describe(make_outputs((15, "a")), *overrides, converted=replace(CONVERTED, mismatch=mismatch))[
        "facts"
    ]
    method = facts["calibration"]
    assert (method["rounding"], method["bias_correction"], method["ranges"]["feature"]) == (
        "nearest",
        "full",
        "mse",
    )
    assert method.get("forced") == forced
    assert facts["delegates"] == 1


def test_numbers_that_json_lacks_are_written_as_text(tmp_path):
    report = ValidationReport((Row("decomposed:canonical", "sqnr_db", math.inf, {"at_least": 200.0}, 2),))
    contents.write_texts(tmp_path, load_recipe(RECIPE), report, None, {"latency_ms": {"median": 1.5}})
    text = (tmp_path / "report.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["rows"][0]["value"] == "inf"
    assert written["rows"][0]["limit"] == {"at_least": 200.0}
    assert written["latency_ms"] == {"median": 1.5}


def test_vectors_are_written_in_the_program_s_layout(tmp_path):
    outputs = make_outputs((15, "a"), (50, "b"), device_error=0.01)  # the device's output is not expected
    contents.write_vectors(tmp_path, outputs, "float32")
    for name, value in (("first", 0.0), ("noisiest", 1 / 8)):
        for kind in ("input", "output"):
            array = np.load(tmp_path / f"vectors/{name}.{kind}.npy")
            assert array.shape == (1, 3, 4, 6)
            assert array.dtype == np.float32
            assert (array == value).all()
