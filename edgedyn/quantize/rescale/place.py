"""Places where the channels of an activation can be rescaled exactly, and the factors that do it.

An activation has one INT8 scale, set by its largest channel. Rescaled, every channel uses all 256 values:

    factor_c = max_c' |x_c'| / max(|x_c|, max_c' |x_c'| / limit)

|x_c| is the largest absolute value of channel c over all calibration samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection


@dataclass(frozen=True)
class Place:
    """One place of a program where channels can be rescaled.

    Attributes:
        activations: nodes whose channels share one set of factors.
        layers: calls of the convolutions and linear layers whose weights change.
        limit: largest factor: a channel that the samples hardly use keeps room for larger values.
        tensor: name of the activation in the calibration table; empty where no Mul is inserted.
    """

    activations: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    limit: float
    tensor: str = ""


@dataclass(frozen=True)
class Scope:
    """The limits of a pass's search for places.

    Attributes:
        section: the recipe's ``quantize`` section.
        generated: names of the generated kernels.
        taken: activations that earlier passes rescale.
    """

    section: QuantizeSection
    generated: Collection[str]
    taken: Collection[fx.Node]


@dataclass(frozen=True)
class RescalePass:
    """A named rewrite of a folded program that leaves its outputs the same but for float rounding.

    Attributes:
        name: name of the pass.
        is_on: whether the recipe's ``quantize`` section asks for the pass.
        find: ``find(module, scope)`` returns the places, in the order of the graph.
        pays: ``pays(module, place, factors)``: whether the rounding error falls enough.
        rescale: ``rescale(module, place, factors)`` changes the module in place. It returns the factors of
            the Mul that it inserts, (C,), or None where the layers take all factors.
    """

    name: str
    is_on: Callable[[QuantizeSection], bool]
    find: Callable[[fx.GraphModule, Scope], list[Place]]
    pays: Callable[[fx.GraphModule, Place, Tensor], bool]
    rescale: Callable[[fx.GraphModule, Place, Tensor], Tensor | None]


def always(module: fx.GraphModule, place: Place, factors: Tensor) -> bool:
    """Rescale wherever it is possible: the rewrite costs nothing at run time, or the recipe asks for it."""
    return True


def channel_factors(maxima: Sequence[Tensor], limit: float) -> Tensor:
    """Return the factors that bring the channels of activations to one range, (C,), from 1 to ``limit``.

    Of several activations, a channel counts by the one where its share of the range is larger.

    Args:
        maxima: per activation the largest absolute value of each channel, (C,); none of them all zero.
        limit: largest factor.
    """
    if len(maxima) > 1:  # the shares of a single one would only add a rounding
        maxima = [torch.stack([largest / largest.max() for largest in maxima]).amax(0)]
    (largest,) = maxima
    top = largest.max()
    return top / largest.clamp(min=top / limit)
