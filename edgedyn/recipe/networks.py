"""The function that makes a network, found by the name that a recipe or a user gives; the rule of trust.

    a name of `edgedyn list networks`    always
    package.module:function              --trust, or all of:
                                           the recipe is named by its path, and lies in no bundle
                                           the module is public, and not of Python's standard library
                                           it defines the function or class, in a file of its package
                                           a module that lies elsewhere than in the working directory gets
                                           numbers as arguments only; a class of networks also plain words

Importing a module runs it, and a function may do anything with a path, a command or a pickle: nothing that
only a recipe names is imported before these rules hold. The working directory is searched for it alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgedyn import models
from edgedyn.bundle.manifest import listed_names
from edgedyn.errors import BundleError, RecipeError, nearest
from edgedyn.recipe.factory import import_factory

_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*:[A-Za-z]\w*", re.ASCII)
_WORD = re.compile(r"[\w-]{1,64}", re.ASCII)
_ADVICE = "If you know the code that it runs, pass --trust (trust=True)."


def find_network(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    trust: bool = False,
    is_named: bool = True,
) -> Callable[..., Any]:
    """Return the function or class that makes a network.

    Args:
        name: of a network of edgedyn/models/, or ``package.module:function``.
        arguments: keyword arguments of the call to come.
        folder: of the recipe that gives the name; None for a user who types it.
        trust: find any function that can be imported.
        is_named: whether the user named the recipe by its path, or the network itself.

    Raises:
        RecipeError: when there is no such network, or it needs ``trust``.
        ModelError: when its module raises or exits while it is imported, with the line.
    """
    if ":" not in name:
        if name not in models.names():
            raise _unknown(name, "there is no such network")
        return models.load(name)
    is_stranger = not is_named or (folder is not None and _is_bundle(Path(folder)))
    if not trust:
        if is_stranger:
            source = "a bundle" if is_named else "a recipe that was not named by its path"
            raise _refusal(name, f"it is named by {source}, where only a network of edgedyn is trusted")
        _check_module(name)
    found = _load(name)
    if not trust:
        _check_function(name, found, arguments or {})
    return found  # type: ignore[no-any-return]


def _is_bundle(folder: Path) -> bool:
    """Tell whether the recipe in a folder is part of a bundle, whole or damaged."""
    try:
        return "recipe.yaml" in listed_names(folder)
    except BundleError:
        return False


def _load(name: str) -> Any:
    module_name, _, function = name.partition(":")
    _find_top(module_name)
    try:
        return getattr(import_factory(module_name), function)
    except (ImportError, AttributeError) as error:
        raise _unknown(name, str(error)) from error


def _find_top(module_name: str) -> Path | None:
    """Return the file or folder of a module's package; import nothing; search the working directory last."""
    top = module_name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) if top else None
        here = os.getcwd()
        if spec is None and here not in sys.path:
            sys.path.append(here)
            spec = importlib.util.find_spec(top) if top else None
            if spec is None:
                sys.path.remove(here)
    except (ImportError, ValueError, OSError):
        return None
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [])
    return Path(places[0] if places else spec.origin or "").resolve()


def _check_module(name: str) -> None:
    """Refuse a module that a recipe may not name; nothing is imported."""
    if not _NAME.fullmatch(name):
        raise _refusal(name, "expected a public function of a public module, package.module:function")
    top = name.partition(":")[0].partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        raise _refusal(name, f"{top} belongs to Python's standard library, which makes no networks")


def _check_function(name: str, found: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse an attribute that its package does not define, and arguments that could be code or a file."""
    if not callable(found) or (not inspect.isclass(found) and _is_network(found)):
        return  # nobody calls it: factory.make_network refuses it in words of its own
    module_name = name.partition(":")[0]
    home = str(getattr(found, "__module__", ""))
    top = module_name.partition(".")[0]
    own = home == module_name or (home.partition(".")[0] == top and "._" not in home)
    if not own or not (inspect.isfunction(found) or inspect.isclass(found)):
        kind = type(found).__name__
        raise _refusal(name, f"it is a {kind} of {home or 'no module'}, not a function or class of {top}")
    place = _find_top(module_name)
    if top != "edgedyn" and place is not None and place.parent == Path.cwd().resolve():
        return  # the user's own code, or a checkout that the user went into
    takes_words = inspect.isclass(found)
    if takes_words and not _is_network(found):
        raise _refusal(name, f"it is a class of {top} that is no torch.nn.Module")
    for key, value in arguments.items():
        odd = [x for x in _leaves(value) if not _is_plain(x, takes_words=takes_words)]
        if odd:
            kinds = "numbers and plain words" if takes_words else "numbers"
            raise _refusal(
                name, f"argument {key} holds {str(odd[0])[:40]!r}; an installed package gets {kinds}"
            )


def _is_network(found: object) -> bool:
    """Tell whether a value is a network, or a class of networks."""
    from torch import nn

    return issubclass(found if inspect.isclass(found) else type(found), nn.Module)


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _is_plain(value: Any, *, takes_words: bool) -> bool:
    if isinstance(value, str):
        return takes_words and bool(_WORD.fullmatch(value)) and not os.path.lexists(value)
    return value is None or isinstance(value, bool | int | float)


def _refusal(name: str, reason: str) -> RecipeError:
    return RecipeError(f"network {name[:100]!r} is not trusted: {reason}. {_ADVICE}")


def _unknown(name: str, reason: str) -> RecipeError:
    return RecipeError(
        f"model.network {name[:100]!r} cannot be loaded ({reason}); {nearest(name, models.names())}expected "
        f"one of {', '.join(models.names())}, or package.module:function of an importable module."
    )
