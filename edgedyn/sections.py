"""Keys and values that a user writes in YAML: what they may be, and what is said of a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """Keys that are known, values of their own type, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Put the first problem of a pydantic error in our words: where, found, expected, next."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" ({len(error.errors()) - 1} more problems follow.)" if len(error.errors()) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {where!r}; {hint}Known here: {', '.join(known)}.{more}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing. Add it.{more}"
    if not where:  # a rule over several values
        return f"{problem['msg']}. Mend these values.{more}"
    return f"{where} is {problem['input']!r}: {problem['msg']}. Mend this value.{more}"


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys that a (nested) section knows."""
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = [field.annotation, *get_args(field.annotation)] if field else []  # X, and X | None
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return [key for key in model.model_fields if key != "folder"]
