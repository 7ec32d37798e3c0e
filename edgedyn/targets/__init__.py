"""Targets, one folder each. A folder adds a target by a constant ``TARGET`` in its ``__init__.py``.

``lower.py`` is the host side (torch, onnx). ``run.py`` is the device side (numpy and the runtime) and defines
``load(path, program) -> run`` where ``run(*arrays)`` returns a list of arrays. Importing a target imports
neither.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.errors import RecipeError, nearest
from edgedyn.extensions import extend_path, load_named, module_names

if TYPE_CHECKING:
    import numpy as np
    from torch import fx
    from torch.export import ExportedProgram

    from edgedyn.report.rows import Row

    Run = Callable[..., list[np.ndarray]]


__path__ = extend_path(__path__, __name__)


@dataclass(frozen=True)
class Int8Scheme:
    """How a target's runtime wants its INT8 operators annotated.

    Attributes:
        symmetric: activations have zero point 0.
        outputs: convolutions also need a quantized output, and PReLU may follow in INT8.
        dynamic: says of a convolution or linear layer whether it may take the range of what it reads from
            each image; it writes float then.
    """

    symmetric: bool
    outputs: bool
    dynamic: Callable[[fx.Node], bool] = lambda node: False


@dataclass(frozen=True)
class Artifact:
    """What lowering leaves behind.

    Attributes:
        programs: program -> plain name of the file written into the output folder that ``load`` takes;
            several programs may share a file.
        facts: measured facts for the report and the manifest: delegated nodes, check-build memory, versions.
        rows: what lowering itself measured with limits, for instance a check build.
    """

    programs: dict[str, str]
    facts: dict[str, object]
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Events:
    """What one run took, as the runtime itself tells it; milliseconds.

    Attributes:
        whole: the program.
        operators: ("layer" or "conversion", time) of its convolutions and matrix products, and of what it
            converts between float and INT8, in the order in which they ran.
    """

    whole: float
    operators: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Target:
    """A runtime that a program is lowered to.

    Attributes:
        name: the folder's name, and the recipe's ``target``.
        summary: one line for ``edgedyn list targets``.
        capabilities: what forms may require of the stock runtime.
        kernels: what forms may require besides where a recipe says ``kernels: fused``: our own kernels.
        precisions: what the recipe may ask for, of ``fp32``, ``fp16``, ``int8``.
        int8: how INT8 is annotated, or None where the target has none.
        lower: ``lower(programs, out, precision) -> Artifact``; ``programs`` is name -> program, one called
            ``forward`` or the parts of a routed one. Writes into the existing folder ``out``.
        preview: ``preview(programs)``: what ``lower`` would make of float programs, nothing is written.
            Returns ``delegated``, the share of operators that an accelerated backend takes, ``portable``
            {operator: count} of the others, and ``unsupported`` {operator: count} that it has no way to run.
        load: ``load(path, program) -> run``; the device side, keeps alive what the runtime needs.
        profile: ``profile(path, program)`` loads a program that keeps count: ``run(*arrays)``, then
            ``read()`` returns the ``Events`` of every run. None where the runtime does not tell what a layer
            takes; else ``lower`` puts ``operators``, program -> what each event is of, into the facts.
        missing: a sentence that says what is not installed and what to do, or None where the target can be
            lowered to and run here.
    """

    name: str
    summary: str
    capabilities: frozenset[str]
    kernels: frozenset[str]
    precisions: frozenset[str]
    int8: Int8Scheme | None
    lower: Callable[[Mapping[str, ExportedProgram], Path, str], Artifact]
    preview: Callable[[Mapping[str, ExportedProgram]], dict[str, Any]]
    load: Callable[[Path, str], Run]
    missing: Callable[[], str | None]
    profile: Callable[[Path, str], Any] | None = None


def deferred(module: str, function: str) -> Callable[..., Any]:
    """Return a function whose module is imported when it is called: a target's runtime may not be here."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def names() -> list[str]:
    """Return the names of all targets."""
    return module_names(__path__, are_folders=True)


def load(name: str, kernels: str = "stock") -> Target:
    """Return the target of that name, with what our own kernels can do where they are ``fused``.

    Raises:
        RecipeError: for an unknown name, the known ones are listed; for a target without kernels of ours.
    """
    if name not in names():
        raise RecipeError(
            f"target {name!r} is unknown; {nearest(name, names())}found targets: {', '.join(names())}. "
            "Pick one in the recipe."
        )
    target = load_named(f"{__name__}.{name}", "TARGET", Target)
    if kernels == "stock":
        return target
    if not target.kernels:
        raise RecipeError(f"target {name!r} has no kernels of ours; expected kernels: stock. Fix the recipe.")
    return replace(target, capabilities=target.capabilities | target.kernels)
