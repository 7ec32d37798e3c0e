"""The list of keys and the JSON schema agree with the recipes that load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgedyn.images.manifest import SetManifest
from edgedyn.recipe.describe import recipe_keys, recipe_schema
from edgedyn.recipe.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
KEYS = {key.key: key for key in recipe_keys()}


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted keys of nested dictionaries; a dictionary that is itself a value is one key."""
    found = set()
    for name, value in values.items():
        key = prefix + name
        is_section = isinstance(value, dict) and (key not in KEYS or KEYS[key].kind == "section")
        found |= leaves(value, f"{key}.") if is_section else {key}
    return found


def test_keys_are_those_of_a_whole_recipe():
    recipe = load_recipe(RECIPES[0])
    written = leaves(recipe.model_dump(exclude={"folder"}))
    optional = {key for key in KEYS if key.startswith(("guide.", "noise."))}
    assert written == set(KEYS) - optional
    assert {key.partition(".")[2] for key in optional} >= {"sigma", "clip", "shape", "range"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_recipe_is_listed(path):
    written = leaves(yaml.safe_load(path.read_text()))
    assert written <= set(KEYS)


def test_types_and_defaults_are_written_as_in_yaml():
    found = {key: (KEYS[key].kind, KEYS[key].default) for key in KEYS}
    assert found["model.network"] == ("text", "required")
    assert found["model.arguments"] == ("mapping", "{}")
    assert found["quantize.ranges.feature"] == ("minmax | percentile | mse | entropy", '"minmax"')
    assert found["quantize.max_drop_db"] == ("number | null", "null")
    assert found["quantize.coverage.bands"] == ("list of number", "[0.0, 1.0]")
    assert found["noise.sigma"] == ("list of number | null", "null")
    assert found["guide"] == ("section", "null")
    assert found["name"] == ("text", "the file's name")
    assert found["quantize.equalize"] == ("boolean", "true")


def test_schema_refuses_unknown_keys_and_knows_what_a_file_may_leave_out():
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields) - {"folder"}
    assert set(schema["required"]) == {"model", "input", "target", "precision", "validation"}
    quantize = schema["$defs"]["QuantizeSection"]
    assert quantize["additionalProperties"] is False
    assert quantize["properties"]["rounding"]["enum"] == ["nearest", "reconstruct"]
    assert quantize["properties"]["shift"]["description"] == KEYS["quantize.shift"].meaning


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_line_of_a_recipe_names_the_schema_for_editors(path):
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    prefix, _, schema = line.partition("=")
    assert prefix == "# yaml-language-server: $schema"
    assert json.loads((path.parent / schema).read_text(encoding="utf-8")) == recipe_schema()


@pytest.mark.parametrize("model", [Recipe, SetManifest])
def test_every_key_has_a_description_in_sentences(model):
    schema = model.model_json_schema()
    keys = {
        f"{section.get('title')}.{name}": value
        for section in (schema, *schema["$defs"].values())
        for name, value in section["properties"].items()
        if name != "folder" and "$ref" not in str(value)  # a section, which has keys
    }
    assert len(keys) > 15
    for key, value in keys.items():
        assert re.fullmatch(r"[A-Z].{14,}\.", value.get("description", "")), key
