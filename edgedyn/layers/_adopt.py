"""Adopt a module of foreign code: prove that it has our structure and outputs, then take its weights.

A class name proves nothing: two papers, or two versions of one, may share it. ``adopt`` compares every key
and shape of the state_dict, and type and options of the convolutions, norms and activations at each path.
``require_outputs`` compares the outputs: a copied class may have another forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


SIZE = (32, 48)  # pixels: the strides and pools of the published layers divide both


def require_outputs(ours: nn.Module, foreign: nn.Module, *rest: Tensor) -> nn.Module:
    """Return our module, proved equal to a foreign one, in float64 on a random input.

    A foreign module that cannot run here is adopted by its structure alone: published operators need a GPU.

    Args:
        ours: adopted.
        foreign: the module that it was made from.
        rest: inputs behind features of 32 x 48 pixels, two samples each.

    Raises:
        ModelError: for outputs of another shape or value.
    """
    expected, actual = copy.deepcopy(ours).double(), copy.deepcopy(foreign).double()
    generator = torch.Generator().manual_seed(0)
    widths = dict.fromkeys(m.in_channels for m in ours.modules() if isinstance(m, nn.Conv2d))
    for channels in widths:
        x = torch.randn((2, channels, *SIZE), generator=generator, dtype=torch.float64)
        if (y := _run(expected, x, *rest)) is None:
            continue  # another layer's width
        found = _run(actual, x, *rest)
        if found is not None:
            shapes = f"returns {tuple(found.shape)} for {tuple(x.shape)}, expected {tuple(y.shape)}"
            require(found.shape == y.shape, foreign, shapes)
            error = float((found - y).abs().max() / y.abs().max().clamp(min=1e-30))
            require(
                error <= 1e-5,
                foreign,
                f"has another forward: its outputs differ by {error:.1e} of the largest",
            )
        break
    return ours


def _run(module: nn.Module, *inputs: Tensor) -> Tensor | None:
    """Return the output of a module, or None where it cannot be called so."""
    try:
        with torch.no_grad():
            y = module(*(x.double().clone() for x in inputs))
    except Exception:  # a foreign forward may raise anything
        return None
    return y if isinstance(y, Tensor) else None


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
