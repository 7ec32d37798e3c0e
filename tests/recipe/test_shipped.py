"""Shipped recipes: found by name from anywhere, a file of the user's first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgedyn.errors import RecipeError
from edgedyn.recipe import shipped
from edgedyn.recipe.recipe import load_recipe
from edgedyn.recipe.shipped import find_recipe, shipped_recipes

RECIPES = Path(__file__).parents[2] / "recipes"
NAME = "mallenet-s.phone.int8"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_checkout_ships_its_folder_of_recipes():
    assert set(shipped_recipes().values()) == set(RECIPES.glob("*.yaml"))
    assert shipped_recipes()[NAME] == RECIPES / f"{NAME}.yaml"


def test_a_wheel_ships_the_folder_inside_of_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "edgedyn/shipped/recipes"
    folder.mkdir(parents=True)
    (folder / "a.b.int8.yaml").write_text("")
    (tmp_path / "recipes").mkdir()  # of somebody else, beside the package
    (tmp_path / "recipes/c.d.int8.yaml").write_text("")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "edgedyn")
    assert shipped_recipes() == {"a.b.int8": folder / "a.b.int8.yaml"}


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml", Path(NAME)])
def test_a_name_is_looked_up_among_the_shipped_recipes(name):
    recipe = load_recipe(name)
    assert recipe.name == NAME
    assert recipe.path(recipe.calibration).resolve() == RECIPES.parent / "calib/skimage.yaml"
    assert recipe.path(recipe.model.weights).is_file()


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml"])
def test_an_existing_file_wins(name):
    Path(name).write_text("mine")
    assert find_recipe(name) == Path(name)


def test_a_folder_of_that_name_does_not_hide_the_recipe():
    Path(NAME).mkdir()
    assert find_recipe(NAME) == RECIPES / f"{NAME}.yaml"


@pytest.mark.parametrize("path", ["malenet-s.phone.int8", f"recipes/{NAME}.yaml", f"./{NAME}"])
def test_a_recipe_that_does_not_exist_names_the_nearest_shipped_one(path):
    expected = f"recipe {path} does not exist; did you mean '{NAME}'? expected a YAML file"
    with pytest.raises(RecipeError, match=re.escape(expected)):
        find_recipe(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_does_not_exist(name):
    with pytest.raises(RecipeError, match="does not exist"):
        find_recipe(name)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="is a folder; expected a YAML file"):
        load_recipe(tmp_path)
