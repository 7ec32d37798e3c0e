"""From a checkpoint of the authors' implementation to our reference of the same class, weights loaded.

Class names and constructor arguments are the authors' own. Files of ``edgedyn/layers/`` list their classes in
``LAYER.authors``, files of ``edgedyn/models/`` their networks in an optional constant ``AUTHORS``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from edgedyn import layers, models
from edgedyn.checkpoints.weights import fit_state
from edgedyn.errors import ModelError, WeightsError

Author = Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]
# keys of a record of arguments that name the class or function; they override ``class_name``
_NAMING_KEYS = ("name", "cls", "block")


def from_authors(
    class_name: str, arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """Build our reference of an authors' class and load their weights into it.

    Args:
        class_name: the authors' name, for instance ``DDFPack``. A module path in front of it and text behind
            it do not count: ``models.resnet32(sparse=True)`` is ``resnet32``. One exception: ``up to layer2``
            behind it selects the network up to that layer, with the state_dict of that part.
            ``arguments["name"]``, ``["cls"]`` or ``["block"]`` override the name.
        arguments: the authors' constructor arguments, by keyword.
        state_dict: the authors' state_dict; its dtype becomes the module's.

    Returns:
        The reference, in evaluation mode.

    Raises:
        ModelError: for an unknown class, or arguments that the authors' class refuses or ignores.
        WeightsError: when the state_dict does not fit, or mixes floating-point types.
    """
    known = load_all()
    name = next((str(arguments[key]) for key in _NAMING_KEYS if key in arguments), bare_name(class_name))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise ModelError(
            f"authors' class {name!r} (from {class_name!r}) is unknown; did you mean {', '.join(near)}? "
            "edgedyn list authors names all."
        )
    if part := re.search(r"\bup to (\w+)", class_name):
        arguments = {**arguments, "up_to": part[1]}
    try:
        module = known[name](arguments, state_dict)
    except TypeError as error:
        raise ModelError(
            f"{name} got arguments {dict(arguments)}: {error}. Pass the authors' constructor arguments."
        ) from error
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise WeightsError(
            f"the state_dict of {name} mixes {sorted(map(str, dtypes))}; expected one floating-point type. "
            "Convert it first."
        )
    module = module.to(dtypes.pop()) if dtypes else module
    complaint = f"the state_dict does not fit {name}"
    fit_state(module, state_dict, complaint, "Check the constructor arguments.")
    return module.eval()


def load_all() -> dict[str, Author]:
    """Return the function that makes our reference, for every authors' class by name."""
    authors: dict[str, Author] = {}
    for layer in layers.load_all().values():
        authors |= layer.authors
    for network in models.names():
        authors |= getattr(importlib.import_module(f"edgedyn.models.{network}"), "AUTHORS", {})
    return authors


def bare_name(class_name: str) -> str:
    """Return ``DDFPack`` of ``ddf.ddf.DDFPack (with gen_kernel_size)``."""
    dotted = re.match(r"[\w.]*", class_name)
    assert dotted is not None  # the pattern matches the empty string
    return dotted.group().rpartition(".")[2]
