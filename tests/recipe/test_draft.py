"""A drafted recipe loads, holds every key, and every key that is switched on is one that loads."""

from __future__ import annotations

import re

import pytest

from edgedyn.errors import RecipeError
from edgedyn.recipe.describe import recipe_keys
from edgedyn.recipe.draft import draft_recipe
from edgedyn.recipe.recipe import load_recipe
from edgedyn.sections import read_yaml

VALUES = {
    "name": "mine",
    "model.network": "mynet:make",
    "input.shape": [1, 3, 64, 96],
    "target": "executorch",
    "precision": "int8",
    "calibration": "photos/calibration",
    "validation": "photos/validation",
}


def dotted(values, prefix=""):
    """Yield the dotted keys of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_a_draft_loads_with_its_values_and_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(draft_recipe(VALUES, ["A note."]))
    recipe = load_recipe(path)
    assert recipe.model.network == "mynet:make"
    assert recipe.input.shape == [1, 3, 64, 96]
    assert (recipe.calibration, recipe.validation) == ("photos/calibration", "photos/validation")
    short = tmp_path / "short.yaml"
    short.write_text(
        "name: mine\nmodel: {network: 'mynet:make'}\ninput: {shape: [1, 3, 64, 96]}\ntarget: executorch\n"
        "precision: int8\ncalibration: photos/calibration\nvalidation: photos/validation\n"
    )
    assert recipe == load_recipe(short)
    assert path.read_text().startswith("# A note.\n")


def test_every_key_stands_in_a_draft_with_its_default_and_meaning():
    text = draft_recipe(VALUES)
    switched_on = re.sub(r"^#((?:  )*[a-z0-9_]+:)", r"\1", text, flags=re.MULTILINE)
    values = read_yaml(switched_on)
    keys = {key.key: key for key in recipe_keys() if key.kind != "section"}
    assert set(dotted(values)) == set(keys)
    assert values["limits"]["exact"] == 1e-12
    assert values["quantize"]["coverage"]["bands"] == [0.0, 1.0]
    words = " ".join(text.replace("#", " ").split())
    for key in keys.values():
        assert " ".join(f"{key.meaning} ({key.kind})".split()) in words


def test_a_draft_that_would_not_load_is_refused_with_every_problem():
    with pytest.raises(RecipeError) as caught:
        draft_recipe({**VALUES, "input.shape": [1, 3], "precision": "int9"})
    assert "2 problems" in str(caught.value)
    assert "input.shape is [1, 3]" in str(caught.value)
    assert "did you mean 'int8'?" in str(caught.value)
