"""Keys and values that a user writes in YAML: what they may be, and what is said of a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """Keys that are known, values of their own type, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Loader(yaml.SafeLoader):
    """Reads 1e-9 and 1E5 as numbers, as YAML 1.2 does; PyYAML is YAML 1.1 and wants 1.0e-9 and 1.0E+5."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would read as a number."""


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Return what YAML text holds.

    Raises:
        yaml.YAMLError: when it is not YAML.
    """
    return yaml.load(text, _Loader)


def dump_yaml(values: dict[str, Any]) -> str:
    """Return values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Put the first problem of a pydantic error in our words: where, found, expected, next."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")  # pydantic's, of a rule of ours
    more = f" ({len(error.errors()) - 1} more problems follow.)" if len(error.errors()) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {where!r}; {hint}Known here: {', '.join(known)}.{more}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing. Add it.{more}"
    if not where:  # a rule over several values
        return f"{message}. Fix these values.{more}"
    return f"{where} is {problem['input']!r}: {message}. Fix this value.{more}"


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys that a (nested) section knows."""
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = [field.annotation, *get_args(field.annotation)] if field else []  # X, and X | None
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return [key for key in model.model_fields if key != "folder"]
