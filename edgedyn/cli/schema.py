"""``edgedyn schema``: the JSON schema of recipes."""

from __future__ import annotations

from edgedyn.cli.options import Verbosity
from edgedyn.cli.terminal import print_json


def schema(verbose: Verbosity = None) -> None:
    """Print the JSON schema of recipes, by which editors complete and check their keys."""
    from edgedyn.recipe.describe import recipe_schema

    print_json(recipe_schema())
