"""Keys and values that a user writes in YAML: their types, and the messages about wrong ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from edgedyn.errors import RecipeError, nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Section(BaseModel):
    """A mapping that refuses unknown keys and values of another type, and never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """Reads 1e-9 and 1E5 as numbers, as YAML 1.2 does; PyYAML follows YAML 1.1: only 1.0e-9 and 1.0E+5."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would read as a number."""


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Return the values of a YAML text.

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    return yaml.load(text, _Loader)


def read_recipe(path: Path, kind: str, see: str) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Args:
        path: the file.
        kind: noun for messages, ``recipe`` or ``training recipe``.
        see: where the reader finds the keys, for messages.

    Raises:
        RecipeError: when the file is missing or unreadable, or holds no keys and values.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{kind} {path} cannot be read ({error.strerror}). Fix its permissions, or name another file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{kind} {path} is not YAML: {str(error).splitlines()[0]}. Fix the file."
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{kind} {path} holds {type(values).__name__}; expected keys and values. See: {see}."
        )
    return values


def parse_recipe(model: type[AnySection], values: dict[str, Any], path: Path, kind: str) -> AnySection:
    """Return the section of a file's values, with the file's folder as ``folder``.

    Raises:
        RecipeError: for an unknown key (the nearest is named), a missing key or a wrong type.
    """
    try:
        return model(**{"name": path.stem, **values}, folder=str(path.parent))  # type: ignore[call-arg]
    except ValidationError as error:
        raise RecipeError(f"{kind} {path}: {explain(error, model)}") from error
    except TypeError as error:  # a key that is not text, or `folder` itself
        raise RecipeError(f"{kind} {path}: {error}. Keys are plain names.") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Return values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Put a pydantic error in words: where, found, expected, next; several problems one per line.

    Unknown keys come first: a misspelt key is also the reason why another one is missing.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    lines = [_explain(problem, model) for problem in problems]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix for a rule of edgedyn
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        hint = nearest(str(problem["loc"][-1]), known)
        return f"unknown key {where!r}; {hint}Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"the key {where!r} is missing. Add it."
    if not where:  # a rule over several values
        return f"{message}. Fix these values."
    hint = _nearest_choice(problem)
    return f"{where} is {problem['input']!r}: {hint}{message}. Fix this value."


def _nearest_choice(problem: ErrorDetails) -> str:
    """Return the hint for a value that is none of a key's choices, or the empty string."""
    if problem["type"] != "literal_error":
        return ""
    choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    return nearest(str(problem["input"]), choices)


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys that a (nested) section knows."""
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = [field.annotation, *get_args(field.annotation)] if field else []  # X, and X | None
        classes = [k for k in kinds if isinstance(k, type) and get_origin(k) is None]  # 3.10 counts list[int]
        model = next((k for k in classes if issubclass(k, BaseModel)), model)
    return [key for key in model.model_fields if key != "folder"]
