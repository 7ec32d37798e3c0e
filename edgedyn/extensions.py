"""Layers, ops, forms, networks and targets of a user, found as if their files lay in this package.

    my_extension/
      layers/blur.py                a constant LAYER
      ops/blur2d/__init__.py        a constant OP
      ops/masked_conv2d/by_rows.py  a constant FORM, for an op that exists
      models/blur_net.py            a constant NETWORK
      targets/printer/__init__.py   a constant TARGET

The environment variable ``EDGEDYN_EXTENSIONS`` names such folders, joined as in ``PATH``. Their files
become modules of this package, ``edgedyn.layers.blur``; nothing else is registered or edited. The variable is
the only way in: recipes, bundles and the working directory add no folder, so none of them runs code.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edgedyn.errors import UsageError

VARIABLE = "EDGEDYN_EXTENSIONS"
ROOMS = ("layers", "models", "ops", "targets")


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_HasName)


def folders() -> list[Path]:
    """Return the folders that the environment variable names, in its order."""
    return [Path(entry).absolute() for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]


def files() -> list[Path]:
    """Return the Python files of all extensions, sorted."""
    return sorted(path for folder in folders() for room in ROOMS for path in (folder / room).rglob("*.py"))


def extend_path(path: Iterable[str], package: str) -> list[str]:
    """Return the search path of a package of ours, followed by the same folder of every extension.

    ``edgedyn.ops`` has ``ops/`` there, ``edgedyn.ops.masked_conv2d`` has ``ops/masked_conv2d/``. Rooms
    call this when they are imported, so nothing is refused here; ``module_names`` refuses wrong folders
    later, when an error can be shown.
    """
    inside = Path(*package.split(".")[1:])
    return [*path, *(str(folder / inside) for folder in folders())]


def module_names(path: Iterable[str], *, are_folders: bool = False) -> list[str]:
    """Return the names of the modules on a package's search path; a leading underscore hides one.

    Args:
        path: the package's ``__path__``.
        are_folders: return packages only.

    Raises:
        UsageError: when an extension has none of the four folders; when two files have one name.
    """
    for folder in folders():
        if not any((folder / room).is_dir() for room in ROOMS):
            raise UsageError(
                f"{VARIABLE} names {folder}, which has none of the folders {', '.join(ROOMS)}; expected at "
                "least one of them. Fix the variable."
            )
    homes: dict[str, Path] = {}
    names = []
    for entry in path:
        for module in pkgutil.iter_modules([entry]):
            home = Path(entry, module.name)
            if module.name in homes:
                raise UsageError(
                    f"{home} has the name of {homes[module.name]}; expected a name of its own. Rename it."
                )
            homes[module.name] = home
            if not module.name.startswith("_") and (module.ispkg or not are_folders):
                names.append(module.name)
    return sorted(names)


def load_constant(module_name: str, constant: str) -> Any:
    """Import a module and return the constant that it is discovered by.

    Raises:
        UsageError: when the module has no such constant.
    """
    module = importlib.import_module(module_name)
    if not hasattr(module, constant):
        raise UsageError(f"{module.__file__} has no constant {constant}; expected one. Define it there.")
    return getattr(module, constant)


def load_named(module_name: str, constant: str, kind: type[Named]) -> Named:
    """Return the constant of a module, of one type, whose ``name`` is the name of its file or folder.

    Raises:
        UsageError: when the module has no such constant, or it has another type or name.
    """
    value = load_constant(module_name, constant)
    expected = module_name.rpartition(".")[2]
    actual = value.name if isinstance(value, kind) else None
    if actual != expected:
        raise UsageError(
            f"{constant} of {module_name} is {type(value).__name__} {actual or value!r}; expected "
            f"{kind.__name__} {expected!r}. Give it the name of its file."
        )
    return value  # type: ignore[no-any-return]
