"""The recipes that edgedyn ships: found by name, in a checkout and in an installed wheel alike.

    checkout, editable install    edgedyn/../recipes/<name>.yaml
    wheel                         edgedyn/shipped/recipes/<name>.yaml

Image sets (``calib/``) lie beside the recipes in both, so that their relative paths hold.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgedyn.errors import RecipeError, nearest

_PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """Return the folder of the shipped recipes: the wheel's, else the checkout's."""
    installed = _PACKAGE / "shipped" / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the file of every shipped recipe by its name, ``<network>.<target>.<precision>``."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe: an existing file first, else a shipped recipe of that name.

    Args:
        recipe: a path, or a plain name such as ``mallenet-s.phone.int8``, with or without ``.yaml``.

    Raises:
        RecipeError: when neither exists; the nearest shipped name is suggested.
    """
    path = Path(recipe)
    if os.path.isfile(path):  # False, not an error, for a name that no file can have
        return path
    shipped = shipped_recipes()
    name = path.name.removesuffix(".yaml")
    if path.name == str(recipe) and name in shipped:
        return shipped[name]
    problem = "is no regular file" if os.path.exists(path) else "does not exist"
    problem = "is a folder" if os.path.isdir(path) else problem
    raise RecipeError(
        f"recipe {recipe} {problem}; {nearest(name, shipped)}expected a YAML file, or the name of a shipped "
        "recipe. See: edgedyn list recipes."
    )
