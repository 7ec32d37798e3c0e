"""Dynamic layers, one file a paper: the faithful reference, and its canonical module that calls our ops.

A file adds a paper by a constant ``LAYER``. ``canonicalize`` swaps every reference layer of a model for its
canonical twin; the rewrite is exact, and no target is involved.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.routing import RoutedModel


@dataclass(frozen=True)
class Layer:
    """A paper's dynamic layers.

    Attributes:
        name: the file's name.
        paper: title and arXiv number.
        primitive: the op that the canonical modules call, or ``routed program``.
        canonical: reference class -> function of an instance of that class, which makes the canonical module
            with the same weights.
        examples: reference modules in evaluation mode with inputs that discriminate.
        authors: name of an authors' class -> function of its constructor arguments and its state_dict, which
            makes our reference, its weights not yet loaded. What the authors' class refuses, or ignores
            without a word, is refused with a ModelError.
        recognise: name of an authors' class -> function of an instance of a class of that name, which makes
            our reference with the same weights and the same call, gives None for an ordinary module that
            shares the name, and raises ModelError, with the reason, for a dynamic one of another structure.
        float32: classes of modules that stay in float32 in every precision, and are never quantized.
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
    """Return every paper's layers by file name."""
    files = sorted(m.name for m in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"edgedyn.layers.{file}").LAYER for file in files]
    return {layer.name: layer for layer in found}


def find_dynamic(model: nn.Module) -> list[tuple[str, nn.Module, Layer]]:
    """List (dotted path, module, paper) of every reference layer in the model, in order of definition."""
    papers = {cls: layer for layer in load_all().values() for cls in layer.canonical}
    return [
        (path, module, papers[type(module)])
        for path, module in model.named_modules()
        if type(module) in papers
    ]


def canonicalize(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which every reference layer is its canonical twin.

    A layer that stands at several places stays one module. The model itself is not changed.

    Raises:
        ModelError: when the model is in training mode, a dynamic layer carries hooks that would be lost, or
            what becomes a routed program is only a part of the model.
    """
    training = [path or "(the model)" for path, module in model.named_modules() if module.training]
    if training:
        raise ModelError(
            f"the model is in training mode ({training[0]} and {len(training) - 1} more modules); a deployed "
            "program has fixed BatchNorm statistics. Call model.eval() first."
        )
    model = copy.deepcopy(model)
    twins: dict[nn.Module, nn.Module] = {}
    for path, module, layer in find_dynamic(model):
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"{path or 'the model'} ({type(module).__name__}) carries forward hooks, which its canonical "
                "form cannot call. Remove them before building."
            )
        twins[module] = layer.canonical[type(module)](module).eval()
        if isinstance(twins[module], RoutedModel) and module is not model:
            raise ModelError(
                f"{path} ({type(module).__name__}) becomes a routed program, which the host runs: expected "
                f"it to be the whole network, found it inside {type(model).__name__}. Move the layers around "
                "it into its gate and its variants."
            )
    if model in twins:  # a routed program may hold other dynamic layers
        return canonicalize(twins[model]) if isinstance(twins[model], RoutedModel) else twins[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children passes over a repeated layer
            if child in twins:
                parent._modules[name] = twins[child]
    return model
