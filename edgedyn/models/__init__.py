"""Networks that a recipe can name, one file each; the constant ``NETWORK`` is the class or function to call.

A network of your own needs no file here: a recipe also takes ``network: package.module:function``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgedyn.extensions import extend_path, load_constant, module_names

__path__ = extend_path(__path__, __name__)


def names() -> list[str]:
    """Return the names of all networks."""
    return module_names(__path__)


def load(name: str) -> Callable[..., Any]:
    """Return the class or function that makes a network.

    Raises:
        ImportError: when there is no file of that name.
        UsageError: when the file has no constant ``NETWORK``.
    """
    network: Callable[..., Any] = load_constant(f"{__name__}.{name}", "NETWORK")
    return network
