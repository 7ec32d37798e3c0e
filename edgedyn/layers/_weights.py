"""Copy a model, and store weights that it computes from its parameters alone.

    weight = g * v / |v|        weight_norm, spectral_norm, orthogonal, pruning masks, any parametrization

Torch computes such a weight before each call, in a parametrization or in a forward pre-hook (its older way).
A deployed program has one value of it, and INT8 needs it as a stored tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgedyn.errors import ModelError, quote


def store_weights(model: nn.Module) -> nn.Module:
    """Replace every parametrization and torch's own weight hooks by the weights that they compute.

    Args:
        model: in evaluation mode, changed in place; a spectral norm is not iterated further.

    Raises:
        ModelError: when a weight cannot be computed, naming module and weight; when it is random.
    """
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                _store_parametrized(module, name, f"{path}.{name}" if path else name)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    return model


def _store_parametrized(module: nn.Module, name: str, path: str) -> None:
    try:
        with torch.no_grad():
            first, second = getattr(module, name), getattr(module, name)
            is_fixed = torch.equal(first, second)
            # removal edits the class, which a copy shares with its original (torch 2.13)
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            trained = list(module.parametrizations[name].parameters(recurse=False))  # type: ignore[index, union-attr]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    except Exception as error:  # the parametrization is code of the user
        raise ModelError(
            f"{path} has a parametrization that cannot be folded into a constant: {quote(error)}. Fold it "
            "yourself: torch.nn.utils.parametrize.remove_parametrizations."
        ) from error
    if trained and name in module._buffers:  # so torch leaves a weight of several originals
        module.register_parameter(name, nn.Parameter(module._buffers.pop(name)))  # type: ignore[arg-type]
    if not is_fixed:
        raise ModelError(
            f"{path} has a parametrization that gives another weight at each call; a deployed program has "
            "constant weights. Is it random in evaluation mode?"
        )


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model with stored weights; the model itself is not changed.

    Raises:
        ModelError: as ``store_weights``; for a weight that a foreign hook computes; for a model that cannot
            be copied. The message names the module.
    """
    # a hook leaves its last weight in the module as a plain tensor with a history, which torch does not copy
    memo = {id(value): value.detach().clone() for _, _, value in _computed(model) if not value.is_leaf}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute of the user raises
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {quote(error)}. Keep files, locks and generators "
            "out of its modules."
        ) from error
    store_weights(copied)
    for path, name, _ in _computed(copied):
        owner = copied.get_submodule(path)
        if owner._forward_pre_hooks:
            hooks = ", ".join(_name(hook) for hook in owner._forward_pre_hooks.values())
            raise ModelError(
                f"{path or 'the model'} ({type(owner).__name__}) computes its {name!r} in a forward pre-hook "
                f"({hooks}); expected a parameter. The hooks of torch.nn.utils (weight_norm, spectral_norm, "
                "prune) are folded, a foreign one is not: store the weight and remove the hook, or write it "
                "as a parametrization."
            )
    return copied


def _computed(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield module path, name and value of weights that are plain attributes of modules, not parameters."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and (name in ("weight", "bias") or not value.is_leaf):
                yield path, name, value


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
