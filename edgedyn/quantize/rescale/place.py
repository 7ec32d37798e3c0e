"""Places where the channels of an activation can be rescaled exactly, and the factors that do it.

An activation has one INT8 scale, set by its largest channel. Rescaled, every channel uses all 256 values:

    factor_c = max_c' |x_c'| / max(|x_c|, max_c' |x_c'| / limit)

|x_c| is the largest absolute value of channel c over all calibration samples. An outlier, a channel more than
32 times as large as the median channel, leaves the others few values, and the limit then keeps them so. Where
the expected rounding error behind the place falls, outliers therefore do not count in the limit:

    factor_c = max_c' |x_c'| / max(|x_c|, max_(c' no outlier) |x_c'| / limit)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from edgedyn.graph.blocks import Block
from edgedyn.graph.nodes import by_input

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection

OUTLIER = 32.0  # times the median channel
_POWER = 1 / 16  # mean square of a channel, as a share of its largest square


@dataclass(frozen=True)
class Place:
    """One place of a program where channels can be rescaled.

    Attributes:
        activations: nodes whose channels share one set of factors.
        layers: calls of the convolutions and linear layers whose weights change.
        limit: largest factor: a channel that the samples hardly use keeps room for larger values.
        tensor: name of the activation in the calibration table; empty where no Mul is inserted.
        for_outliers: rescale only where a channel is an outlier.
    """

    activations: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    limit: float
    tensor: str = ""
    for_outliers: bool = False


@dataclass(frozen=True)
class Scope:
    """The limits of a pass's search for places.

    Attributes:
        section: the recipe's ``quantize`` section.
        generated: names of the generated kernels.
        taken: activations that earlier passes rescale, and those inside of blocks.
        blocks: inverted-residual blocks that a kernel of ours computes.
    """

    section: QuantizeSection
    generated: Collection[str]
    taken: Collection[fx.Node]
    blocks: Sequence[Block] = ()


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
        error: ``error(module, place, factors, largest)``: expected rounding error behind the place for these
            factors and channel maxima, up to a constant. None where outliers count in the limit.
        mends_outliers: whether it takes the places with outliers also where the recipe does not ask for it.
    """

    name: str
    is_on: Callable[[QuantizeSection], bool]
    find: Callable[[fx.GraphModule, Scope], list[Place]]
    pays: Callable[[fx.GraphModule, Place, Tensor], bool]
    rescale: Callable[[fx.GraphModule, Place, Tensor], Tensor | None]
    error: Callable[[fx.GraphModule, Place, Tensor, Tensor], float] | None = None
    mends_outliers: bool = False


def always(module: fx.GraphModule, place: Place, factors: Tensor) -> bool:
    """Rescale wherever it is possible: the rewrite costs nothing at run time, or the recipe asks for it."""
    return True


def channel_factors(maxima: Sequence[Tensor], limit: float, *, outliers_count: bool = True) -> Tensor:
    """Return the factors that bring the channels of activations to one range, (C,), from 1 upwards.

    Of several activations, a channel counts by the one where its share of the range is larger.

    Args:
        maxima: per activation the largest absolute value of each channel, (C,); none of them all zero.
        limit: largest factor; of channels that are no outliers where these do not count.
        outliers_count: whether outliers count in the limit.
    """
    if len(maxima) > 1:  # the shares of a single one would only add a rounding
        maxima = [torch.stack([largest / largest.max() for largest in maxima]).amax(0)]
    (largest,) = maxima
    top = largest.max()
    counted = top if outliers_count else largest[~find_outliers(largest)].max()
    return top / largest.clamp(min=counted / limit)


def find_outliers(largest: Tensor) -> Tensor:
    """Return which channels are more than 32 times as large as the median channel that is not zero, (C,)."""
    return largest > OUTLIER * largest[largest > 0].median()


def rounding_error(weight: Tensor, factors: Tensor, largest: Tensor) -> float:
    """Return the expected squared error of a layer's outputs by rounding its inputs and its weight to INT8.

    The layer reads ``factors * x`` with the weight divided by the factors.

    Args:
        weight: of a convolution or linear layer, (O, C / groups, ...).
        factors: (C,).
        largest: largest absolute value of each channel of x, (C,).
    """
    scaled = (weight / by_input(factors, weight)).flatten(1)
    peaks = by_input(factors * largest, weight).expand_as(weight).flatten(1)
    of_inputs = (peaks.max() / 255) ** 2 * scaled.square().sum()
    of_weights = (scaled.abs().amax(1) / 127).square() * peaks.square().sum(1) * _POWER
    return float(of_inputs + of_weights.sum())
