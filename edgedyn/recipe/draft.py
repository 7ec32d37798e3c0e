"""A commented recipe for a network of the user's: the keys that matter set, every other one with its default.

    # (fp32 | fp16 | int8)
    precision: int8

    #tile:
      # pixels that neighbouring tiles share (integer)
    #  overlap: 32

A key is switched on by removing its ``#``.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from edgedyn.errors import RecipeError
from edgedyn.recipe.describe import REQUIRED, Key, recipe_keys
from edgedyn.recipe.recipe import Recipe
from edgedyn.sections import dump_yaml, explain, read_yaml

_WIDTH = 100


def draft_recipe(values: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """Return a recipe as YAML in which every key of ``edgedyn list keys`` stands with its meaning.

    Args:
        values: dotted key -> value; keys without a value are comments that show their default.
        notes: sentences for the top of the file.

    Raises:
        RecipeError: for values that make no recipe; every problem is named.
    """
    lines = [f"# {line}" for note in notes for line in textwrap.wrap(note, _WIDTH)]
    keys = recipe_keys()
    roots = dict.fromkeys(key.key.partition(".")[0] for key in keys)
    for root in roots:
        lines += ["", *_block(root, [key for key in keys if key.key.partition(".")[0] == root], values)]
    text = "\n".join(lines) + "\n"
    try:
        Recipe(**read_yaml(text))
    except ValidationError as error:
        raise RecipeError(f"the drafted recipe: {explain(error, Recipe)}") from error
    return text


def _block(root: str, keys: Sequence[Key], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of one key of the top level, with the keys below it."""
    opened: set[str] = set()
    for key in keys:
        *sections, name = key.key.split(".")
        if key.kind == "section":
            yield from _comment(key.meaning, "")
            continue
        for depth, section in enumerate(sections):
            path = ".".join(sections[: depth + 1])
            if path not in opened:
                opened.add(path)
                is_set = any(other.startswith(path + ".") for other in values)
                yield f"{'' if is_set else '#'}{'  ' * depth}{section}:"
        indent = "  " * len(sections)
        yield from _comment(f"{key.meaning} ({key.kind})".lstrip(), indent)
        if key.key in values:
            yield f"{indent}{_value(name, values[key.key])}"
        else:
            yield f"#{indent}{name}: {'' if key.default == REQUIRED else key.default}".rstrip()


def _value(name: str, value: Any) -> str:
    return dump_yaml({name: value}).strip() if isinstance(value, str) else f"{name}: {json.dumps(value)}"


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH)]
