"""Targets, one folder each; the constant ``TARGET`` in a folder's ``__init__.py`` adds it.

``lower.py`` is the host side (torch, onnx). ``run.py`` is the device side (numpy and the runtime): its
``load(path, program)`` returns ``run(*arrays) -> list of arrays``. Importing a target imports neither file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgedyn.errors import RecipeError, nearest
from edgedyn.extensions import extend_path, load_named, module_names

if TYPE_CHECKING:
    import numpy as np
    from torch import fx

    from edgedyn.report.rows import Row

    Run = Callable[..., list[np.ndarray]]


__path__ = extend_path(__path__, __name__)
_BLOCK, _BLOCK_KERNEL = "inverted_residual", "edgedyn_block_kernel"  # the op, and its kernel's capability


@dataclass(frozen=True)
class Int8Scheme:
    """Requirements of a target's runtime on INT8 operators.

    Attributes:
        symmetric: activations have zero point 0.
        outputs: convolutions also need a quantized output, and PReLU may follow in INT8.
        dynamic: whether the input range of a convolution or linear layer may be computed from each image; the
            layer's output is float then.
        fuses_blocks: whether a kernel of ours computes inverted-residual blocks (``graph/blocks.py``): a
            block's layers are quantized behind activation and mask, and its output is float.
    """

    symmetric: bool
    outputs: bool
    dynamic: Callable[[fx.Node], bool] = lambda node: False
    fuses_blocks: bool = False


@dataclass(frozen=True)
class Artifact:
    """The result of lowering.

    Attributes:
        programs: program -> plain name of its file in the output folder, for ``load``; several programs may
            share a file.
        facts: measurements for the report and the manifest: delegated nodes, check-build memory, versions.
        rows: measurements with limits that lowering itself makes, for instance of a check build.
    """

    programs: dict[str, str]
    facts: dict[str, object]
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Events:
    """Times of one run from the runtime's own profiler, in milliseconds.

    Attributes:
        whole: time of the whole program.
        operators: ("layer" or "conversion", time) of every convolution and matrix product, and of every
            conversion between float and INT8, in the order in which they ran.
    """

    whole: float
    operators: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Target:
    """A runtime that a program is lowered to.

    Attributes:
        name: the folder's name, and the recipe's ``target``.
        summary: one line for ``edgedyn list targets``.
        capabilities: capabilities of the stock runtime, which forms may require. (A form is one way to
            compute an op of ours: a plain function of ordinary operators, or the op's own node.)
        kernels: further capabilities under ``kernels: fused`` in a recipe, which our own kernels bring.
        precisions: precisions that a recipe may name, of ``fp32``, ``fp16``, ``int8``.
        int8: requirements on INT8 operators, or None where the target has no INT8.
        lower: ``lower(programs, out, precision) -> Artifact``; ``programs`` is name -> program: one named
            ``forward``, or the parts of a routed network. Writes into the existing folder ``out``.
        preview: ``preview(programs)`` lowers float programs and writes nothing. Returns ``delegated``, the
            share of operators that an accelerated backend takes; ``portable``, {operator: count} of the
            others; ``unsupported``, {operator or sentence: count} of the parts that the runtime cannot run;
            ONNX targets also return ``operators``, {operator: count} of all.
        load: ``load(path, program) -> run``; the device side; ``run`` owns all objects of the runtime.
        profile: ``profile(path, program)`` loads a program with its profiler on: ``run(*arrays)``, then
            ``read()`` returns the ``Events`` of every run. ``lower`` then puts ``operators`` into the facts:
            program -> the layer of each event. None where the runtime has no times per layer.
        missing: returns a sentence that names a missing package and its fix, or None where the target can be
            lowered to and run here.
        compile: ``compile(lowered, engine, workspace_bytes=None, progress=None)`` builds the engine of a
            lowered file, on the device, and returns its facts. None where ``load`` runs the lowered file.
        load_kernels: compiles our kernels where they are not in the cache, and loads them into this process;
            refuses without a compiler. None where this machine's runtime does not take them.
        fuses_blocks: whether ``lower`` and ``preview`` make one node of every inverted-residual block.
    """

    name: str
    summary: str
    capabilities: frozenset[str]
    kernels: frozenset[str]
    precisions: frozenset[str]
    int8: Int8Scheme | None
    lower: Callable[..., Artifact]
    preview: Callable[..., dict[str, Any]]
    load: Callable[[Path, str], Run]
    missing: Callable[[], str | None]
    profile: Callable[[Path, str], Any] | None = None
    compile: Callable[..., dict[str, object]] | None = None
    load_kernels: Callable[[], Path] | None = None
    fuses_blocks: bool = False


def deferred(module: str, function: str) -> Callable[..., Any]:
    """Return a function that imports its module when called: a target's runtime may not be installed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def names() -> list[str]:
    """Return the names of all targets."""
    return module_names(__path__, are_folders=True)


def load(name: str, kernels: str = "stock", forms: Mapping[str, str] = MappingProxyType({})) -> Target:
    """Return the target of a name; with ``fused`` kernels its capabilities include those of our own kernels.

    Args:
        name: of the target.
        kernels: ``stock`` or ``fused``.
        forms: op name -> form name, a recipe's ``forms``: ``inverted_residual: three_convolutions`` keeps
            blocks as they are.

    Raises:
        RecipeError: for an unknown name, with the known ones; for a target without kernels of ours.
        NoFormError: where the target cannot run the requested form of a block.
    """
    if name not in names():
        raise RecipeError(
            f"target {name!r} is unknown; {nearest(name, names())}found targets: {', '.join(names())}. "
            "Pick one in the recipe."
        )
    target = load_named(f"{__name__}.{name}", "TARGET", Target)
    if kernels == "stock":
        return _fuse_blocks(target, forms)
    if not target.kernels:
        raise RecipeError(f"target {name!r} has no kernels of ours; expected kernels: stock. Fix the recipe.")
    return _fuse_blocks(replace(target, capabilities=target.capabilities | target.kernels), forms)


def _fuse_blocks(target: Target, forms: Mapping[str, str]) -> Target:
    """Return the target so that it makes one node of every block, where it has the kernel for that form."""
    if _BLOCK_KERNEL not in target.capabilities and _BLOCK not in forms:
        return target
    from edgedyn import ops

    if ops.choose_form(ops.load_all()[_BLOCK], target, forms.get(_BLOCK)).fn is not None:
        return target
    return replace(
        target,
        fuses_blocks=True,
        int8=target.int8 and replace(target.int8, fuses_blocks=True),
        lower=partial(target.lower, fuses_blocks=True),
        preview=partial(target.preview, fuses_blocks=True),
    )
