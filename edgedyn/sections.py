"""Keys and values that a user writes in YAML: their types, and the messages about wrong ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgedyn.errors import RecipeError, nearest, shown
from edgedyn.reading import TextError, read_text

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch and numpy both take

MAX_YAML_BYTES = 16 * 2**20
MAX_DEPTH = 50
MAX_ALIASED = (
    10_000  # nodes that aliases may repeat, all together: a few hundred bytes can stand for billions
)
_MAX_PROBLEMS = 20


class Section(BaseModel):
    """A mapping that refuses unknown keys, values of another type, NaN and infinity, and never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """Reads 1e-9 and 1E5 as numbers, as YAML 1.2 does; PyYAML follows YAML 1.1: only 1.0e-9 and 1.0E+5.

    It refuses deep nesting and large aliases while it reads: no memory is taken for them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = self._aliased = 0
        self._sizes: dict[str, int] = {}  # nodes under each anchor that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            self._aliased += self._sizes.get(name, 0)
            if self._aliased > MAX_ALIASED or (name in self.anchors and name not in self._sizes):
                raise _refusal(event, f"the alias {shown(name)} repeats itself or too many values")
            return super().compose_node(parent, index)
        before, self._nodes, self._depth = self._nodes + self._aliased, self._nodes + 1, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise _refusal(event, f"lists and keys in more than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes + self._aliased - before
        return node

    def value_of(self, node: yaml.Node) -> Any:
        """Return the value of a node: only those that JSON has, and each key once."""
        kind = node.tag.rpartition(":")[2]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping_of(node)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value_of(child) for child in node.value]
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise _refusal(node, f"{shown(node.value)} is of type {kind}; put it in quotes to make it text")
        if kind in ("int", "float") and len(node.value) > _MAX_DIGITS:
            raise _refusal(node, f"a number of {len(node.value)} digits; expected at most {_MAX_DIGITS}")
        try:
            value = self.yaml_constructors[node.tag](self, node)
        except (ValueError, LookupError) as error:  # int(), and PyYAML's own tables
            raise _refusal(node, f"{shown(node.value)} is no {kind}") from error
        if isinstance(value, str) and (found := _NO_TEXT.search(value)):
            raise _refusal(node, f"the text holds the character {found[0]!a}; remove it")
        return value

    def _mapping_of(self, node: yaml.MappingNode) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                value = self.value_of(value_node)
                for mapping in reversed(value if isinstance(value, list) else [value]):
                    if not isinstance(mapping, dict):
                        raise _refusal(value_node, f"<< of {shown(mapping)}; expected keys and values")
                    merged.update(mapping)
                continue
            key = self.value_of(key_node)
            if not isinstance(key, str):
                raise _refusal(
                    key_node, f"the key {shown(key)} is not text: put it in quotes. Keys are plain names"
                )
            if key in values:
                raise _refusal(key_node, f"the key {shown(key)} is there twice; remove one")
            values[key] = self.value_of(value_node)
        return merged | values


_SCALARS = ("null", "bool", "int", "float", "str")
_MAX_DIGITS = 100
_NO_TEXT = re.compile("[\\x00\\ud800-\\udfff]")  # in no file's name, and in no encoding


def _refusal(place: Any, problem: str) -> TextError:
    """Return the error for a node or an event of YAML."""
    mark = place.start_mark
    return TextError(f"line {mark.line + 1}, column {mark.column + 1}: {problem}")


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would read as a number."""


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Return the values of a YAML text: those that JSON has, each key once, aliases of a limited size.

    Raises:
        TextError: for any other text, with the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.value_of(node)
    except TextError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise TextError(f"line {line}: the character {chr(error.character)!a}; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise TextError(f"{place}{error.problem or error.context}") from error
    except Exception as error:  # PyYAML lets through what int(), chr() and its own tables raise
        place = f"line {loader.line + 1}: " if loader else ""
        raise TextError(f"{place}{type(error).__name__}, {error}") from error


def read_yaml_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        OSError: when it cannot be read, with a reason in ``strerror``: missing, no regular file, too large.
        TextError: when it is not YAML, or holds no keys and values.
    """
    values = read_yaml(read_text(path, MAX_YAML_BYTES))
    if not isinstance(values, dict):
        raise TextError(f"it holds {type(values).__name__}; expected keys and values")
    return values


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
        return read_yaml_file(path)
    except OSError as error:
        raise RecipeError(
            f"{kind} {path} cannot be read ({error.strerror}). Fix its permissions, or name another file."
        ) from error
    except TextError as error:
        raise RecipeError(f"{kind} {path} is not YAML of keys and values: {error}. See: {see}.") from error


def parse_recipe(model: type[AnySection], values: dict[str, Any], path: Path, kind: str) -> AnySection:
    """Return the section of a file's values, with the file's folder as ``folder``.

    Raises:
        RecipeError: for an unknown key (the nearest is named), a missing key or a wrong type.
    """
    try:
        return model(**{"name": path.stem, **values}, folder=str(path.parent))  # type: ignore[call-arg]
    except ValidationError as error:
        raise RecipeError(f"{kind} {path}: {explain(error, model)}") from error
    except TypeError as error:  # `folder` itself
        raise RecipeError(f"{kind} {path}: {error}. Keys are plain names.") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Return values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Put a pydantic error in words: where, found, expected, next; several problems one per line.

    Unknown keys come first: a misspelt key is also the reason why another one is missing.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    lines = [_explain(problem, model) for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return lines[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems", *lines])


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> str:
    place = problem["loc"]
    if place[-1:] and place[-1] in ("int", "float", "bool", "str"):  # pydantic's name of a choice of types
        place = place[:-1]
    where = ".".join(str(part) for part in place)
    message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix for a rule of edgedyn
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        hint = nearest(str(problem["loc"][-1]), known)
        return f"unknown key {shown(where)}; {hint}Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"the key {where!r} is missing. Add it."
    if not where:  # a rule over several values
        return f"{message}. Fix these values."
    hint = _nearest_choice(problem)
    return f"{where} is {shown(problem['input'])}: {hint}{message}. Fix this value."


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
