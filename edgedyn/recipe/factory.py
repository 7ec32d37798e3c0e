"""Call a factory, the function or class that makes a network; a refusal quotes the user's own line."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgedyn.errors import EdgedynError, ModelError, RecipeError, quote

if TYPE_CHECKING:
    from torch import nn


def import_factory(module_name: str) -> ModuleType:
    """Import the module of a factory.

    Raises:
        ImportError: when there is no such module.
        ModelError: when it raises or exits while it is imported, with the line.
    """
    try:
        with _no_command_line():
            return importlib.import_module(module_name)
    except EdgedynError:
        raise
    except (Exception, SystemExit) as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{module_name}.".startswith(f"{error.name}.")
        ):
            raise
        raise ModelError(
            f"the module {module_name!r} of the network cannot be imported: {quote(error)}. Fix this line."
        ) from error


def make_network(factory: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call a factory and return its network.

    Args:
        factory: a function or class.
        name: its name in the recipe or on the command line.
        arguments: keyword arguments, the recipe's ``model.arguments``.

    Raises:
        RecipeError: when it does not take the arguments.
        ModelError: when it raises or exits, with the line; when it returns no network.
    """
    from torch import nn

    if isinstance(factory, nn.Module) or not callable(factory):
        raise ModelError(
            f"network {name!r} is {_kind(factory)}; expected a function or class that makes a "
            "torch.nn.Module. Write one: def make(): return net."
        )
    try:
        signature = inspect.signature(factory)
        signature.bind(**arguments)
    except TypeError as error:
        raise RecipeError(
            f"model.arguments {sorted(arguments)} do not fit {name!r}: {error}; expected {signature}. Fix "
            "model.arguments in the recipe; edgedyn inspect calls MODULE:FUNCTION without any."
        ) from error
    except ValueError:  # some classes of C have no signature; the call itself tells
        pass
    try:
        with _no_command_line():
            network = factory(**arguments)
    except EdgedynError:  # a network of ours refuses the value of an argument
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"network {name!r} cannot be made: {quote(error)}. Fix this line, or model.arguments in the "
            "recipe."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"network {name!r} returned a value that is {_kind(network)}, expected torch.nn.Module. Return "
            "the network itself."
        )
    return network


@contextlib.contextmanager
def _no_command_line() -> Iterator[None]:
    """Hide the command line: the ``main`` of a package, named in a recipe, would start what stands in it."""
    words = sys.argv
    sys.argv = words[:1]
    try:
        yield
    finally:
        sys.argv = words


def _kind(value: object) -> str:
    return type(value).__name__
