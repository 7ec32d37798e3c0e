"""The sets of a recipe: its own noise in place of theirs, how many samples it asks for, sets from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from small_sets import entry, save_image, write_pairs, write_set
from torch import nn

from edgedyn import CalibrationSet, extensions, pipeline
from edgedyn.conversion import evaluation_sets
from edgedyn.conversion.convert import load_target
from edgedyn.conversion.evaluation_sets import make_evaluation_sets
from edgedyn.conversion.image_sets import draw, draw_more
from edgedyn.conversion.table_key import table_key
from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.images.image_set import open_set
from edgedyn.quantize.table.table import read_table
from edgedyn.recipe.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.network=small_networks:small_mallenet", "model.weights=null", "model.arguments={}"]
SMALL += ["input.shape=[1, 3, 32, 48]", "tile.overlap=0", "quantize.keep_float=[]", "quantize.dynamic=[]"]
SMALL += ["quantize.rounding=nearest"]  # the quick one: nothing here looks at weights
ONE_LEVEL = ["noise.sigma=[25.0]", "noise.clip=false"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "mallenet-s.phone.int8.yaml", [*SMALL, *overrides])


def photos(count: int = 4) -> list[np.ndarray]:
    """Return parts of a photo of scikit-image, which the recipe's validation set does not hold."""
    whole = skimage.data.astronaut()
    return [whole[64 * k : 64 * k + 64, :96] for k in range(count)]


def test_recipe_gives_both_sets_its_own_noise():
    calibration, samples = pipeline.load_sets(recipe(*ONE_LEVEL))
    assert {s.condition for s in samples} == {"sigma=25"}
    assert {s.condition for s in calibration.draw([(1, 3, 32, 48)])} == {"sigma=25"}
    plain, usual = pipeline.load_sets(recipe())
    assert {s.condition for s in usual} == {"sigma=15", "sigma=25", "sigma=50"}
    assert calibration.digest() != plain.digest()


def test_recipe_augments_colours_of_the_calibration_set_alone():
    calibration, samples = pipeline.load_sets(recipe("quantize.color_augmented=3"))
    plain, usual = pipeline.load_sets(recipe("quantize.color_augmented=0"))
    assert len(list(calibration.draw([(1, 3, 32, 48)]))) == len(list(plain.draw([(1, 3, 32, 48)]))) + 3
    assert len(samples) == len(usual)


def test_color_augmented_samples_are_neither_fine_tuned_on_nor_evaluated():
    given = recipe("quantize.color_augmented=3", "quantize.finetune=5", "quantize.max_drop_db=0.1")
    calibration, _ = pipeline.load_sets(given)
    assert len(draw(given, calibration)) == calibration.samples + 3
    assert len(draw_more(given, calibration)) == calibration.samples
    evaluation = make_evaluation_sets(given, calibration, nn.Identity(), {"method": {}})["forward"]
    assert len(evaluation.inputs) == calibration.samples


def test_cached_measurements_serve_every_limit_of_the_same_method_and_code(
    tmp_path, tmp_path_factory, monkeypatch
):
    code = tmp_path / "reconstruct.py"
    code.write_text("nearest")
    monkeypatch.setattr(evaluation_sets, "__file__", str(tmp_path / "conversion/evaluation_sets.py"))

    def cache_path(limit: float, rounding: str = "nearest") -> Path:
        given = recipe(f"quantize.max_drop_db={limit}", f"quantize.rounding={rounding}")
        calibration, _ = pipeline.load_sets(given)
        key = {"method": given.quantize.model_dump()}
        return make_evaluation_sets(given, calibration, nn.Identity(), key)["forward"].remember.path

    first = cache_path(0.1)
    assert cache_path(0.2) == first
    assert cache_path(0.1, "reconstruct") != first
    code.write_text("stochastic")
    second = cache_path(0.1)
    assert second != first
    layer = tmp_path_factory.mktemp("extension") / "layers/blur.py"
    layer.parent.mkdir()
    layer.write_text("")
    monkeypatch.setenv(extensions.VARIABLE, str(layer.parents[1]))
    assert cache_path(0.1) != second


def test_recipe_noise_is_as_strict_as_that_of_a_manifest():
    with pytest.raises(RecipeError, match="has sigma; expected clip, sigma or clip, sigma_range; clip: true"):
        recipe("noise.sigma=[25.0]")
    with pytest.raises(RecipeError, match=r"unknown key 'noise.sigmas'; did you mean 'sigma'\?"):
        recipe("noise.sigmas=[25.0]")


def test_table_of_other_noise_is_refused_by_its_field(tmp_path):
    """The clipping rule is part of a table's key: what clipped noise gave is never used for unclipped."""
    table = tmp_path / "table.json"
    pipeline.calibrate(recipe(*ONE_LEVEL), table)
    given = [f"quantize.table={table}", "noise.sigma=[25.0]", "noise.clip=true"]
    calibration, samples = pipeline.load_sets(recipe(*given))
    target = load_target(recipe(*given))
    network = pipeline.rewrite_network(recipe(*given), target)
    with pytest.raises(CalibrationError, match="of another data"):
        pipeline.convert(network, target, calibration, samples[0])


def test_sets_of_different_clipping_rules_are_refused(tmp_path):
    path = write_set(tmp_path, noise={"sigma": [25.0], "clip": True})
    with pytest.raises(
        CalibrationError, match="'waves' has clip: true, and validation set 'skimage-validation'"
    ):
        pipeline.load_sets(recipe(f"calibration={path}"))


def test_validation_needs_a_clean_file_for_each_noisy_photo_or_for_none(tmp_path):
    noisy = [entry(save_image(tmp_path / f"{k}.png", seed=k)) for k in range(2)]
    path = write_set(tmp_path, names=(), noise={"kind": "real"}, files=noisy)
    _, samples = pipeline.load_sets(recipe(f"validation={path}"))
    assert not any(s.has_truth for s in samples)
    mixed = [noisy[0], {**noisy[1], "clean": entry(save_image(tmp_path / "c.png", seed=2))}]
    path = write_set(tmp_path, names=(), noise={"kind": "real"}, files=mixed)
    with pytest.raises(
        CalibrationError, match=r"'waves' has 1 noisy photos .* such as 0\.png, and 1 with one"
    ):
        pipeline.load_sets(recipe(f"validation={path}"))
    _, samples = pipeline.load_sets(recipe(f"validation={write_pairs(tmp_path)}"))
    assert {s.condition for s in samples} == {"real"}


def test_recipe_takes_as_many_samples_as_it_asks_for_each_of_another_image(tmp_path):
    for k in range(9):
        save_image(tmp_path / f"{k}.png", seed=k)
    calibration, _ = pipeline.load_sets(recipe(f"calibration={tmp_path}", "quantize.samples=3"))
    drawn = [s.source for s in calibration.draw([(1, 3, 32, 48)])]
    assert drawn == ["0.png", "3.png", "6.png"]


def test_folder_gives_more_than_its_usual_number_where_the_recipe_asks_for_it(tmp_path):
    for k in range(70):
        save_image(tmp_path / f"{k:02}.png", seed=k, size=(8, 8))
    calibration, _ = pipeline.load_sets(recipe(f"calibration={tmp_path}", "quantize.samples=70"))
    assert len(calibration.images) == calibration.samples == 70


def test_fewer_images_than_the_recipe_asks_for_are_refused(tmp_path):
    """Crops of one image are several samples of a set, and yet one image; so is a copy of a file."""
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        save_image(tmp_path / f"{name}.png", seed=seed)
    words = r"has 32 calibration samples, each of another image \(quantize.samples\), and the set .* has 2 "
    with pytest.raises(CalibrationError, match=words) as caught:
        pipeline.load_sets(recipe(f"calibration={tmp_path}", "quantize.samples=32"))
    assert "--set quantize.samples=2." in str(caught.value)
    pipeline.load_sets(recipe(f"calibration={tmp_path}", "quantize.samples=2"))


def test_set_from_python_takes_the_place_of_the_recipe_s(tmp_path):
    out = tmp_path / "table.json"
    pipeline.calibrate(recipe(), out, calibration=CalibrationSet.of(photos(), samples=4, name="mine"))
    images = read_table(out).images
    assert (images["name"], images["samples"]) == ("mine", 4)
    assert [file["name"] for file in images["files"]] == [f"mine[{k}]" for k in range(4)]


def test_set_from_python_has_a_digest_that_finds_its_table_again(tmp_path):
    given = recipe(f"quantize.table={tmp_path / 'table.json'}")
    made = CalibrationSet.of(photos(), samples=4)
    pipeline.calibrate(given, tmp_path / "table.json", calibration=made)
    target, (_, samples) = load_target(given), pipeline.load_sets(given)
    again = CalibrationSet.of(photos(), samples=4)
    network = pipeline.rewrite_network(given, target)
    assert pipeline.convert(network, target, again, samples[0]).mismatch == ""
    with pytest.raises(CalibrationError, match="of another data"):
        pipeline.convert(network, target, CalibrationSet.of(photos()[::-1], samples=4), samples[0])


def test_set_from_python_that_holds_validation_images_is_refused():
    held_out = skimage.data.chelsea()
    with pytest.raises(CalibrationError, match=r"share 1 files .*chelsea\.png \(images\[4\]\)"):
        pipeline.load_sets(recipe(), CalibrationSet.of([*photos(), held_out], samples=5))


def test_file_that_is_not_finite_is_named_before_anything_is_calibrated(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(photos()[0]).save(folder / "a.png")
    np.save(folder / "b.npy", np.where(np.eye(64) == 1, np.nan, 0.5))
    with pytest.raises(CalibrationError, match=r"b\.npy holds 64 values that are NaN or infinite"):
        pipeline.calibrate(recipe(f"calibration={folder}"), tmp_path / "table.json")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_number_of_samples_that_a_recipe_asks_for_is_no_part_of_the_method(tmp_path):
    """What is drawn is in the digest of the data: asking for what the set gives anyway changes nothing."""
    given = recipe("quantize.samples=7")
    images, _ = pipeline.load_sets(given)
    assert table_key(given, images, {}, {}) == table_key(recipe(), images, {}, {})


def test_build_takes_a_set_from_python(tmp_path):
    """Refused by what it holds: so it is this set that the build looks at, before anything else is done."""
    flat = [np.full((64, 96, 3), 0.5, np.float32)]
    with pytest.raises(CalibrationError, match=r"images\[0\] is constant \(0\.500\)"):
        pipeline.build(recipe(), tmp_path / "bundle", calibration=CalibrationSet.of(flat, samples=1))


def test_network_conditioned_on_its_noise_level_is_calibrated_and_validated_at_it():
    path = RECIPES / "ffdnet-color.phone.int8.yaml"
    small = ["model.weights=null", "input.shape=[1, 3, 32, 48]", "tile.overlap=0"]
    for overrides, wanted in (
        ([], 25.0),
        (["model.arguments.sigma=15.0"], 15.0),
        (["noise={kind: gaussian, sigma: [40.0], clip: false}"], 40.0),
    ):
        calibration, samples = pipeline.load_sets(load_recipe(path, [*small, *overrides]))
        assert {sample.sigma for sample in samples} == {wanted}
        assert {sample.sigma for sample in calibration.draw([(1, 3, 32, 48)])} == {wanted}


def conditioned(*overrides: str) -> Recipe:
    """Return a recipe of a network conditioned on sigma."""
    small = [
        "model.weights=null",
        "input.shape=[1, 3, 32, 48]",
        "tile.overlap=0",
        "quantize.color_augmented=0",
    ]
    return load_recipe(RECIPES / "ffdnet-color.phone.int8.yaml", [*small, *overrides])


def test_level_of_a_conditioned_network_leaves_a_set_its_clipping_rule(tmp_path):
    made = []
    for k, name in enumerate(("calibration", "validation")):
        (tmp_path / name).mkdir()
        photo = entry(save_image(tmp_path / name / "a.png", seed=k))
        noise = {"sigma_range": [5.0, 50.0], "clip": True}
        made.append(f"{name}={write_set(tmp_path / name, names=(), files=[photo], noise=noise)}")
    calibration, samples = pipeline.load_sets(conditioned("model.arguments.sigma=200", *made))
    assert (calibration.noise.sigma, calibration.noise.clip) == ([200.0], True)
    assert {sample.condition for sample in samples} == {"sigma=200"}
    assert min(sample.noisy.min() for sample in samples) == 0
    assert max(sample.noisy.max() for sample in samples) == 1
    with pytest.raises(CalibrationError, match="clip: false, and validation set 'waves' has clip: true"):
        pipeline.load_sets(conditioned(made[1]))


@pytest.mark.parametrize(
    "noise",
    [{"kind": "poisson-gaussian", "gain": [0.01], "read_noise": [0.02], "clip": False}, {"kind": "none"}],
    ids=lambda noise: noise["kind"],
)
def test_network_conditioned_on_a_level_leaves_noise_without_one_as_it_is(tmp_path, noise):
    calibration, _ = pipeline.load_sets(conditioned(f"calibration={write_set(tmp_path, noise=noise)}"))
    assert calibration.noise.to_json() == noise


@pytest.mark.parametrize("level", ["-5", ".nan", ".inf"])
def test_level_that_is_none_is_refused(level):
    with pytest.raises(RecipeError, match=r"model\.arguments\.sigma(:| is (nan|inf):) .* Fix"):
        pipeline.load_sets(conditioned(f"model.arguments.sigma={level}"))


def test_noisy_photos_stay_the_input_of_a_network_conditioned_on_a_level(tmp_path):
    _, samples = pipeline.load_sets(conditioned(f"validation={write_pairs(tmp_path)}"))
    assert {sample.condition for sample in samples} == {"real"}


def test_argument_sigma_that_is_a_fact_is_no_level():
    _, samples = pipeline.load_sets(conditioned("model.arguments.sigma=true"))
    assert {sample.condition for sample in samples} == {"sigma=15", "sigma=25", "sigma=50"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("ffdnet-color.*.yaml")), ids=lambda path: path.stem)
def test_shipped_networks_conditioned_on_a_level_have_unclipped_noise_of_it(path):
    shipped = load_recipe(path)
    for name in (shipped.calibration, shipped.validation):
        if name is not None:
            noise = open_set(shipped.path(name), noise=shipped.sets_noise).noise
            assert noise.to_json() == {"kind": "gaussian", "sigma": [25.0], "clip": False}
