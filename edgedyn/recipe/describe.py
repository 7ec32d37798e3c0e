"""Every key of a recipe with type, default and meaning: a list for people, a JSON schema for editors."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgedyn.recipe.recipe import Recipe
from edgedyn.sections import Section

REQUIRED = "required"
_INTERNAL = {"folder"}  # set by load_recipe, never written by a user
_FROM_FILE_NAME = {"name"}


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        key: dotted path, ``quantize.ranges.feature``.
        kind: type or choices, as a user writes them: ``number``, ``list of text``, ``minmax | mse``.
        default: as YAML, or ``required``.
        meaning: one sentence.
    """

    key: str
    kind: str
    default: str
    meaning: str

    def to_json(self) -> dict[str, str]:
        """Return the key as ``edgedyn list keys --json`` prints it."""
        return asdict(self)


def recipe_keys() -> list[Key]:
    """Return every key that a recipe may hold, in the order of definition."""
    return list(_keys_of(Recipe, ""))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    for name in _INTERNAL:
        del schema["properties"][name]
    schema["required"] = [name for name in schema["required"] if name not in _FROM_FILE_NAME]
    schema["title"] = "edgedyn recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        if name in _INTERNAL:
            continue
        inner, optional = _section_of(field.annotation)
        if inner is None:
            yield Key(prefix + name, _kind(field.annotation), _default(name, field), field.description or "")
            continue
        if optional:  # a whole section that may be left out
            yield Key(prefix + name, "section", "null", field.description or "")
        yield from _keys_of(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """Return the section that an annotation names, if it does, and whether null is allowed in its place."""
    options = get_args(annotation) if _is_union(annotation) else (annotation,)
    # Python 3.10 takes list[int] for a type, too
    classes = [kind for kind in options if isinstance(kind, type) and get_origin(kind) is None]
    sections = [kind for kind in classes if issubclass(kind, Section)]
    return (sections[0], type(None) in options) if sections else (None, False)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _kind(annotation: Any) -> str:
    """Return a type as a user of YAML calls it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if _is_union(annotation):
        return " | ".join(_kind(kind) for kind in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    if issubclass(annotation, Section):
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return names[annotation]


def _default(name: str, field: FieldInfo) -> str:
    """Return a default as YAML's JSON subset writes it."""
    if name in _FROM_FILE_NAME and field.is_required():
        return "the file's name"
    return REQUIRED if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
