"""Recipes: their values and defaults, and the refusals of wrong ones."""

from __future__ import annotations

import datetime
import hashlib
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from edgedyn import models, targets
from edgedyn.errors import EdgedynError, RecipeError
from edgedyn.recipe.keys import LimitSection
from edgedyn.recipe.recipe import Recipe, load_recipe

SMALLEST = {
    "model": {"network": "mallenet", "arguments": {"width": 4}},
    "input": {"shape": [1, 3, 48, 64]},
    "target": "executorch",
    "precision": "int8",
    "validation": "photos",
}


def write(where: Path, /, **changes) -> Path:
    path = where / "net.executorch.int8.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, **changes}), encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_name_folder_and_defaults_come_from_the_file(tmp_path):
    recipe = load_recipe(write(tmp_path))
    assert recipe.name == "net.executorch.int8"
    assert recipe.path("photos") == tmp_path / "photos"
    method = recipe.quantize
    assert (method.rounding, method.bias_correction, method.table) == ("reconstruct", "none", None)
    assert (method.coverage.samples, method.coverage.own, method.coverage.bands) == (4, 16, [0, 1])
    limits = recipe.limits
    assert (limits.gate, limits.mask_flips, limits.flipped_margin) == (0.995, 0.005, 0.25)
    assert recipe.tile.overlap == 32
    assert recipe.calibration is None


def test_recipe_survives_a_round_trip_through_yaml(tmp_path):
    recipe = load_recipe(write(tmp_path, forms={"sliced_depthwise2d": "fused"}))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert load_recipe(again).digest() == recipe.digest()


def test_text_that_looks_like_a_number_survives_a_round_trip_through_yaml(tmp_path):
    recipe = load_recipe(write(tmp_path), ["input.name='1e5'", "quantize.max_drop_db=1e-9"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_digest_follows_the_values_and_not_the_folder(tmp_path):
    (tmp_path / "other").mkdir()
    recipe = load_recipe(write(tmp_path))
    assert load_recipe(write(tmp_path / "other")).digest() == recipe.digest()
    assert load_recipe(write(tmp_path), ["limits.drop_db=0.3"]).digest() != recipe.digest()


def test_input_spec_is_half_only_for_half_precision(tmp_path):
    spec = load_recipe(write(tmp_path)).input_specs()[0]
    assert (spec.name, spec.dtype, spec.shape, spec.range) == ("image", "float32", (1, 3, 48, 64), (0, 1))
    assert load_recipe(write(tmp_path), ["precision=fp16"]).input_specs()[0].dtype == "float16"


def test_recipe_cannot_be_changed(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write(tmp_path)).target = "tensorrt"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"taget": "x"},
            ["unknown key 'taget'", "did you mean 'target'?", "Known here: name, model, task, input"],
        ),
        (
            {"quantize": {"roundin": "nearest"}},
            ["'quantize.roundin'", "did you mean 'rounding'?", "bias_correction, bn_reestimation"],
        ),
        ({"zzzzzz": 1}, ["unknown key 'zzzzzz'; Known here:"]),
        ({"target": 3}, ["target is 3", "string", "Fix this value"]),
        ({"input": {"shape": [1, 3, 32]}}, ["input.shape is [1, 3, 32]", "at least 4 items"]),
        ({"input": {"shape": "1x3x32x32"}}, ["input.shape is '1x3x32x32'", "list"]),
        *(
            ({"input": {"shape": [1, 3, 64, size]}}, [str(size)[:10], "expected sizes from 1 to 16384"])
            for size in (2**14 + 1, 2**63, 10**30)
        ),
        ({"inputs": [{"name": "n", "shape": [1, 99999], "value": 1}]}, ["'n' is [1, 99999]; expected sizes"]),
        ({"input": {}}, ["the key 'input.shape' is missing. Add it."]),
        ({"limits": {"drop_db": math.nan}}, ["limits.drop_db is nan", "finite number"]),
        ({"limits": {"sqnr_db": math.inf}}, ["limits.sqnr_db is inf", "finite number"]),
        ({"limits": {"int8_share": 1.5}}, ["limits.int8_share is 1.5", "less than or equal to 1"]),
        *(
            ({"limits": {key: -0.1}}, [f"limits.{key} is -0.1", "greater than or equal to 0"])
            for key in LimitSection.model_fields
        ),
        *(({key: ""}, [f"{key} is ''", "at least 1 character"]) for key in ("calibration", "validation")),
        *(
            ({"quantize": {key: ""}}, [f"quantize.{key} is ''", "at least 1 character"])
            for key in ("table", "finetune_images")
        ),
        ({"model": {"network": "x", "weights": ""}}, ["model.weights is ''", "at least 1 character"]),
        ({"quantize": {"max_drop_db": math.inf}}, ["quantize.max_drop_db is inf", "finite number"]),
        ({"model": {"network": "x", "seed": -1}}, ["model.seed is -1", "greater than or equal to 0"]),
        ({"model": {"network": "x", "seed": 2**63}}, ["model.seed is 9223372036854775808", "less than"]),
        ({"model": {"network": "x", "arguments": {"a": [1, math.nan]}}}, ["arguments.a", "finite number"]),
        ({"noise": {"sigma": [math.inf], "clip": True}}, ["noise.sigma.0 is inf", "finite number"]),
        ({"precision": "int4"}, ["precision is 'int4'", "'fp32', 'fp16' or 'int8'"]),
        ({"quantize": {"rounding": "up"}}, ["quantize.rounding is 'up'", "'nearest' or 'reconstruct'"]),
        (
            {"quantize": {"ranges": {"percentile": 50}}},
            ["quantize.ranges.percentile is 50: ", "expected more than 50 and at most 100, (50, 100]"],
        ),
        *(
            ({"quantize": {"ranges": {"percentile": value}}}, [f"percentile is {value}: ", "(50, 100]"])
            for value in (100.1, float("nan"))
        ),
        ({"quantize": {"finetune": -1}}, ["quantize.finetune is -1", "greater than or equal to 0"]),
        ({"quantize": {"finetune": 20000}}, ["quantize.finetune is 20000", "less than or equal to 10000"]),
        (
            {"quantize": {"finetune_images": "photos"}},
            ["finetune_images is 'photos' and finetune is 0 steps; expected steps, or no images"],
        ),
        (
            {"quantize": {"coverage": {"samples": -1}}},
            ["coverage.samples is -1", "greater than or equal to 0"],
        ),
        ({"quantize": {"coverage": {"own": 0}}}, ["coverage.own is 0", "greater than or equal to 1"]),
        ({"quantize": {"coverage": {"bands": [0.5]}}}, ["coverage.bands is [0.5]", "at least 2 items"]),
        *(
            (
                {"quantize": {"coverage": {"bands": bands}}},
                [f"bands is {bands}; expected edges that increase"],
            )
            for bands in ([0.5, 0.25], [0.25, 0.25], [-0.25, 0.5], [0.5, 1.25])
        ),
        (
            {"quantize": {"color_augmented": -1}},
            ["quantize.color_augmented is -1", "greater than or equal to 0"],
        ),
        (
            {"quantize": {"color_augmented": 2}, "input": {"shape": [1, 1, 32, 48]}},
            ["quantize.color_augmented is 2; expected 0 for images of 1 channel, which have no colours"],
        ),
        ({"tile": {"overlap": -1}}, ["tile.overlap is -1", "greater than or equal to 0"]),
        ({"tile": {"overlap": "32"}}, ["tile.overlap is '32'", "integer"]),
        (
            {"precision": "int4", "target": 3},
            [": 2 problems\n", "\n  target is 3", "\n  precision is 'int4'"],
        ),
        ({"folder": "/"}, ["folder"]),
    ],
    ids=lambda v: "" if isinstance(v, list) else str(v).replace(" ", ""),
)
def test_wrong_key_or_value_is_refused_with_what_is_expected(tmp_path, changes, words):
    path = write(tmp_path, **changes)
    text = refused(path)
    for word in (str(path), *words):
        assert word in text


def test_missing_file_says_how_to_list_recipes(tmp_path):
    text = refused(tmp_path / "none.yaml")
    assert "none.yaml does not exist; expected a YAML file" in text
    assert "edgedyn list recipes" in text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a: [1, 2", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a\n- b\n", "holds list; expected keys and values"),
        (b"", "holds NoneType"),
        (b"1: 2\n", "Keys are plain names"),
    ],
    ids=["unclosed", "binary", "list", "empty", "number-key"],
)
def test_file_that_is_no_recipe_is_refused(tmp_path, content, word):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert word in refused(path)


def test_set_replaces_and_adds_values_of_any_type(tmp_path):
    overrides = [
        "quantize.rounding=nearest",
        "quantize.keep_float=[tail, levels.*]",
        "forms.sliced_depthwise2d=fused",
        "input.shape=[1, 3, 64, 96]",
        "limits.drop_db=0.5",
        "model.sha256=null",
        "input.meaning=a=b",
    ]
    recipe = load_recipe(write(tmp_path), overrides)
    assert recipe.quantize.rounding == "nearest"
    assert recipe.quantize.keep_float == ["tail", "levels.*"]
    assert recipe.forms == {"sliced_depthwise2d": "fused"}
    assert recipe.input.shape == [1, 3, 64, 96]
    assert recipe.limits.drop_db == 0.5
    assert recipe.model.sha256 is None
    assert recipe.input.meaning == "a=b"
    assert recipe.model.arguments == {"width": 4}


@pytest.mark.parametrize("text", ["1e-9", "1E5", "+2.5e3", ".5e-1", "1.e2", "1.0e-9"])
def test_number_with_an_exponent_is_a_number_in_the_file_and_on_the_command_line(tmp_path, text):
    assert load_recipe(write(tmp_path), [f"quantize.max_drop_db={text}"]).quantize.max_drop_db == float(text)
    path = write(tmp_path)
    further = f"inputs: [{{name: level, shape: [1], value: -{text.lstrip('+')}}}]\n"
    path.write_text(path.read_text(encoding="utf-8") + further)
    assert load_recipe(path).inputs[0].value == -float(text)


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "'1e-9'"])
def test_text_that_is_nearly_a_number_stays_text(tmp_path, text):
    assert load_recipe(write(tmp_path), [f"input.name={text}"]).input.name == text.strip("'")


def test_set_paths_start_at_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    more = ["quantize={finetune: 1}", "quantize.finetune_images=photos"]
    recipe = load_recipe(path, ["validation=set.yaml", "model.weights=w.safetensors", *more])
    assert recipe.path(recipe.validation) == tmp_path / "here" / "set.yaml"
    assert recipe.path(recipe.model.weights) == tmp_path / "here" / "w.safetensors"
    assert recipe.path(recipe.quantize.finetune_images) == tmp_path / "here" / "photos"


def test_other_weights_on_the_command_line_are_not_held_to_the_file_s_digest(tmp_path):
    path = Path(__file__).parents[2] / "recipes/mallenet-s.phone.fp32.yaml"
    assert load_recipe(path).model.sha256 is not None
    assert load_recipe(path, ["model.weights=mine.safetensors"]).model.sha256 is None
    both = ["model.sha256=abc", "model.weights=mine.safetensors"]
    assert load_recipe(path, both).model.sha256 == load_recipe(path, both[::-1]).model.sha256 == "abc"


@pytest.mark.parametrize("override", ["quantize.rounding", "=3", "a..b=1", ".a=1", ""])
def test_set_without_key_or_value_is_refused(tmp_path, override):
    text = refused(write(tmp_path), override)
    assert (
        f"--set {override!r} is no override; expected key=value, for instance quantize.rounding=nearest"
        in text
    )


def test_set_below_a_plain_value_is_refused(tmp_path):
    assert "'target' is a value; expected a section" in refused(write(tmp_path), "target.name=x")


def test_set_of_an_unknown_key_is_refused_like_one_in_the_file(tmp_path):
    assert "did you mean 'keep_float'?" in refused(write(tmp_path), "quantize.keepfloat=[a]")


def test_set_with_broken_yaml_is_refused(tmp_path):
    assert "input.shape=[1" in refused(write(tmp_path), "input.shape=[1")


def make_network(width: int = 2) -> nn.Module:
    return nn.Conv2d(3, width, 1)


def test_model_is_loaded_in_evaluation_mode(tmp_path):
    model = load_recipe(write(tmp_path)).load_model()
    assert type(model).__name__ == "MalleNet"
    assert not model.training


def test_network_may_be_a_function_of_the_user(tmp_path):
    section = {"network": f"{__name__}:make_network", "arguments": {"width": 5}}
    assert load_recipe(write(tmp_path, model=section)).load_model().out_channels == 5


def test_weights_are_loaded_relative_to_the_recipe_and_their_digest_is_kept(tmp_path):
    from safetensors.torch import save_file

    state = {"weight": torch.full((2, 3, 1, 1), 7.0), "bias": torch.ones(2)}
    save_file(state, tmp_path / "w.safetensors")
    section = {"network": f"{__name__}:make_network", "weights": "w.safetensors"}
    recipe = load_recipe(write(tmp_path, model=section))
    assert torch.equal(recipe.load_model().weight, state["weight"])
    assert recipe.weights_digest() == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert load_recipe(write(tmp_path)).weights_digest() == ""


@pytest.mark.parametrize("network", ["mallenett", "no_such_package.net:make", f"{__name__}:no_such_function"])
def test_unknown_network_is_refused_with_the_known_ones(tmp_path, network):
    recipe = load_recipe(write(tmp_path, model={"network": network}))
    with pytest.raises(RecipeError) as caught:
        recipe.load_model()
    assert f"model.network {network!r} cannot be loaded" in str(caught.value)
    assert f"expected one of {', '.join(models.names())}, or package.module:function" in str(caught.value)


def test_arguments_that_the_network_does_not_take_are_refused(tmp_path):
    section = {"network": "mallenet", "arguments": {"depth": 3}}
    with pytest.raises(RecipeError, match=r"model\.arguments.*depth"):
        load_recipe(write(tmp_path, model=section)).load_model()


def test_every_recipe_of_the_project_is_valid():
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        recipe = load_recipe(path)
        assert path.stem.split(".")[2] == recipe.precision
        assert recipe.precision in targets.load(recipe.target).precisions


@pytest.mark.parametrize(
    "phone",
    sorted((Path(__file__).parents[2] / "recipes").glob("*.phone.int8.yaml")),
    ids=lambda path: path.stem,
)
def test_one_table_serves_both_targets(phone):
    jetson = phone.with_name(phone.name.replace("phone", "jetson"))
    assert load_recipe(phone).quantize == load_recipe(jetson).quantize


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", datetime.date(2024, 1, 1), object(), {"a": {2: 3}}])
def test_arguments_that_json_cannot_hold_are_refused_from_python_too(value):
    with pytest.raises(ValidationError, match=r"model\.arguments"):
        Recipe(
            name="net",
            model={"network": "x", "arguments": {"a": value}},
            input={"shape": [1, 3, 32, 32]},
            target="executorch",
            precision="fp32",
            validation="photos",
        )


@pytest.mark.parametrize("arguments", ["{channels: [1]}", "{channels: -5}", "{channels: text}"])
def test_a_network_that_fails_on_its_arguments_is_refused_with_its_own_words(tmp_path, arguments):
    recipe = load_recipe(write(tmp_path), ["model.network=mallenet", f"model.arguments={arguments}"])
    with pytest.raises(EdgedynError, match=r"channels|Error"):
        recipe.load_model()


def test_an_override_that_is_no_yaml_or_a_bomb_is_refused_and_cut(tmp_path):
    path = write(tmp_path)
    bomb = "[" + ", ".join(["&a [1, 2, 3]", *["*a"] * 5000]) + "]"
    for override in (f"model.arguments={bomb}", "model.seed=" + "[" * 10_000, "limits.drop_db={a: 1, a: 2}"):
        with pytest.raises(RecipeError, match="the value is not YAML: line 1") as caught:
            load_recipe(path, [override])
        assert len(str(caught.value)) < 400


def test_a_pipe_or_a_device_in_place_of_a_recipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.yaml")
    for path in (tmp_path / "net.yaml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match="is no regular file"):
            load_recipe(path)
