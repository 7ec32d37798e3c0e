"""Dynamic layers, one file per paper: the faithful reference, and its canonical counterpart on our ops.

``canonicalize`` replaces every reference layer of a model by its canonical counterpart, which computes the
same output and is independent of the target.

A file or folder with a constant ``LAYER`` adds a paper; its name does not start with an underscore. It lies
here, or in the folder ``layers`` of an extension: a folder of the user that the environment variable
``EDGEDYN_EXTENSIONS`` names. An extension also adds ops (``ops``, ``OP``), networks (``models``, ``NETWORK``)
and targets (``targets``, ``TARGET``); its files become modules of this package, ``layers/blur.py`` becomes
``edgedyn.layers.blur``. See ``edgedyn/extensions.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.extensions import extend_path, load_named, module_names
from edgedyn.layers._routed import RoutedModel, part_inputs, parts, routing_of
from edgedyn.layers._weights import copy_model, store_weights

__all__ = [
    "Layer",
    "RoutedModel",
    "canonicalize",
    "find_dynamic",
    "float32_classes",
    "load_all",
    "part_inputs",
    "parts",
    "recognise",
    "replace_modules",
    "routing_of",
    "store_weights",
]
__path__ = extend_path(__path__, __name__)


@dataclass(frozen=True)
class Layer:
    """A paper's dynamic layers.

    Attributes:
        name: the file's name.
        paper: title and arXiv number.
        primitive: the op that the canonical modules call, or ``routed program``.
        canonical: reference class -> function that makes the canonical module, with the same weights, from an
            instance of that class.
        examples: yields (reference module in evaluation mode, inputs); the inputs tell a wrong index from a
            right one: B >= 2, H != W.
        authors: name of an authors' class -> function of its constructor arguments and its state_dict that
            makes our reference, weights not yet loaded. It raises ModelError for arguments that the authors'
            class refuses, or silently ignores.
        recognise: name of an authors' class -> function of an instance of a class of that name. It returns
            our reference with the same weights and the same call, or None for an ordinary module that shares
            the name; it raises ModelError for a dynamic module of another structure.
        float32: module classes that stay in float32 in every precision and are never quantized.
    """

    name: str
    paper: str
    primitive: str
    canonical: Mapping[type[nn.Module], Callable[[Any], nn.Module]]
    examples: Callable[[], Iterable[tuple[nn.Module, tuple[Tensor, ...]]]]
    authors: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]] = field(
        default_factory=dict
    )
    recognise: Mapping[str, Callable[[Any], nn.Module | None]] = field(default_factory=dict)
    float32: tuple[type[nn.Module], ...] = ()


def load_all() -> dict[str, Layer]:
    """Return the ``Layer`` of every paper by file name."""
    return {name: load_named(f"{__name__}.{name}", "LAYER", Layer) for name in module_names(__path__)}


def float32_classes() -> frozenset[str]:
    """Return ``package.module.Class`` of every module class that stays in float32 in every precision."""
    return frozenset(
        f"{cls.__module__}.{cls.__qualname__}" for layer in load_all().values() for cls in layer.float32
    )


def find_dynamic(model: nn.Module) -> list[tuple[str, nn.Module, Layer]]:
    """List (dotted path, module, paper) of every reference layer in the model, in order of definition."""
    papers = {cls: layer for layer in load_all().values() for cls in layer.canonical}
    return [
        (path, module, papers[type(module)])
        for path, module in model.named_modules()
        if type(module) in papers
    ]


def recognise(model: nn.Module) -> nn.Module:
    """Return a copy of the model with our references, same weights, in place of the authors' dynamic layers.

    Class name and structure identify them. A layer used at several places stays one module. Weights that the
    model computes from its parameters alone are stored (``store_weights``).

    Raises:
        ModelError: when the model is in training mode; for a layer with hooks; for a weight that cannot be
            stored (``store_weights``); for a dynamic module that has the name of an authors' layer and
            another structure; for a class derived from our references.
    """
    training = [path or "(the model)" for path, module in model.named_modules() if module.training]
    if training:
        raise ModelError(
            f"the model is in training mode ({training[0]} and {len(training) - 1} more modules); a deployed "
            "program has fixed BatchNorm statistics. Call model.eval() first."
        )
    papers = load_all().values()
    ours = tuple(cls for layer in papers for cls in layer.canonical)
    by_name = {name: make for layer in papers for name, make in layer.recognise.items()}

    def take_over(module: nn.Module, path: str) -> nn.Module | None:
        if type(module) in ours and "forward" in vars(module):
            raise ModelError(
                f"{path or 'the model'} is {_name(module)} with a forward of its own, so nothing proves a "
                "rewrite. Use the class as it is."
            )
        if type(module) in ours or type(module).__module__.startswith("edgedyn."):
            return None
        if isinstance(module, ours):
            raise ModelError(
                f"{path or 'the model'} is {_name(module)}, derived from {_name(module, 1)}: its forward may "
                "differ from the paper's, so nothing proves a rewrite. Use the class itself, or add a "
                "layer of your own: edgedyn/layers/__init__.py says how."
            )
        make = by_name.get(type(module).__name__)
        return make(module) if make else None

    return replace_modules(copy_model(model), take_over)


def canonicalize(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which the canonical counterpart replaces every dynamic layer.

    A layer used at several places stays one module. The model itself is not changed. A network that
    chooses its own structure becomes a ``RoutedModel``.

    Raises:
        ModelError: as ``recognise``; when a dynamic layer carries hooks that would be lost; when a routed
            network is only a part of the model.
    """
    canonical = {cls: make for layer in load_all().values() for cls, make in layer.canonical.items()}

    def rewrite(module: nn.Module, path: str) -> nn.Module | None:
        make = canonical.get(type(module))
        return make(module) if make else None

    known = recognise(model)
    kinds = {path: _name(module) for path, module in known.named_modules()}
    found = replace_modules(known, rewrite)
    inner = [path for path, module in found.named_modules() if path and isinstance(module, RoutedModel)]
    if inner:
        raise ModelError(
            f"{inner[0]} ({kinds[inner[0]]}) becomes a routed program, which the host runs: expected it to "
            f"be the whole network, found it inside {_name(model)}. Move the layers around it into its gate "
            "and its variants."
        )
    return found


def replace_modules(model: nn.Module, make: Callable[[nn.Module, str], nn.Module | None]) -> nn.Module:
    """Replace modules from the outside in, each once wherever it is used, also inside of replacements.

    Args:
        model: changed in place.
        make: ``make(module, path)`` returns the replacement, or None to keep the module.

    Raises:
        ModelError: when a replaced module carries forward hooks.
    """
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> nn.Module:
        if module in replaced:
            return replaced[module]
        replacement = make(module, path)
        if replacement is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise ModelError(
                f"{path or 'the model'} ({_name(module)}) carries forward hooks, which its replacement "
                "cannot call. Remove them before building."
            )
        result = module if replacement is None else replacement.eval()
        replaced[module] = replaced[result] = result
        for name, child in result._modules.items():  # named_children passes over a repeated layer
            if child is not None:
                result._modules[name] = visit(child, f"{path}.{name}" if path else name)
        return result

    return visit(model, "")


def _name(module: nn.Module, base: int = 0) -> str:
    """Return the name of a module's class, or of its ancestor number ``base``."""
    return type(module).__mro__[base].__name__
