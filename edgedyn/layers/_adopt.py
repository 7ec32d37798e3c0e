"""Adopt a module of foreign code: prove that it has our structure, then take its weights.

A class name proves nothing: two papers, or two versions of one, may share it. ``adopt`` compares every key
and shape of the state_dict, and type and options of the convolutions, norms and activations at each path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from edgedyn.errors import ModelError

_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def require(fact: bool, foreign: nn.Module, found: str) -> None:
    """Raise a ModelError unless the fact holds; ``found`` describes the foreign module."""
    if not fact:
        raise ModelError(
            f"a foreign {type(foreign).__name__} ({type(foreign).__module__}) {found}; it differs from "
            "the published layer of that name. Rename its class if it is another layer, or build "
            "the network of edgedyn's own layers."
        )


def adopt(make: Callable[[Any], nn.Module], foreign: nn.Module) -> nn.Module:
    """Return our module with the weights, types and norm constants of a foreign one of the same structure.

    Args:
        make: makes our module from the attributes of the foreign one; its weights do not matter.
        foreign: instance of a class that we do not know.

    Raises:
        ModelError: with the first difference in structure.
    """
    try:
        ours = make(foreign)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"a foreign {type(foreign).__name__} ({type(foreign).__module__}) is dynamic but not of the "
            f"published structure: {error}. Build the network of edgedyn's own layers."
        ) from error
    theirs = foreign.state_dict()
    own = ours.state_dict()
    different = sorted(own.keys() ^ theirs.keys())
    require(not different, foreign, f"has other parameters than expected, the first is {different[:1]}")
    for key, value in own.items():
        shape = tuple(theirs[key].shape)
        require(shape == value.shape, foreign, f"has {key!r} of shape {shape}, expected {tuple(value.shape)}")
    for path, module in ours.named_modules():
        _compare(path, module, foreign)
    for value in theirs.values():
        if value.is_floating_point():
            ours = ours.to(value.device, value.dtype)
            break
    ours.load_state_dict(theirs)
    return ours.train(foreign.training)


def _compare(path: str, ours: nn.Module, foreign: nn.Module) -> None:
    """Compare one convolution, norm or activation with the foreign module at the same path."""
    if not isinstance(ours, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.ReLU6):
        return
    try:
        theirs: Any = foreign.get_submodule(path)
    except AttributeError:
        require(False, foreign, f"has no module {path!r}")
    kind = next(k for k in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.ReLU) if isinstance(ours, k))
    found = f"has {type(theirs).__name__} as {path!r}, expected {kind.__name__}"
    require(isinstance(theirs, kind), foreign, found)
    if isinstance(ours, nn.Conv2d):
        for name in _CONVOLUTION:
            mine, other = getattr(ours, name), getattr(theirs, name)
            require(mine == other, foreign, f"has {path}.{name} = {other}, expected {mine}")
    if isinstance(ours, nn.BatchNorm2d):
        ours.eps = theirs.eps
