"""All rescale passes of calibration, in their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, fx

from edgedyn.graph.blocks import Block
from edgedyn.quantize.rescale.equalize import EQUALIZE
from edgedyn.quantize.rescale.generated import EQUALIZE_TAPS
from edgedyn.quantize.rescale.input_rescale import RESCALE_INPUTS
from edgedyn.quantize.rescale.output_rescale import RESCALE_OUTPUTS
from edgedyn.quantize.rescale.place import Place, RescalePass, Scope, channel_factors, find_outliers

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection

PASSES: tuple[RescalePass, ...] = (EQUALIZE, EQUALIZE_TAPS, RESCALE_OUTPUTS, RESCALE_INPUTS)
"""From the cheapest rewrite to the dearest; a pass leaves alone the activations of those before it.

1. ``equalize``: two convolutions take all factors, and the program has no more operators than before.
2. ``equalize_taps``: generated kernels; a Mul on their small grid.
3. ``rescale_outputs``: a Mul behind the layer, on the whole feature map.
4. ``rescale_inputs``: a Mul in front of the layers. Whether it pays depends on the layers' weights, which are
   final only after the passes above.

All places are found, and all channel maxima measured, before the first rewrite: no two places share an
activation, and every rewrite is exact, so that none changes the maxima of the next.

``shift`` is no pass of this list: it moves zero points, which exist only in the program with Q/DQ pairs.
"""


def find_places(
    module: fx.GraphModule,
    section: QuantizeSection,
    generated: Collection[str] = frozenset(),
    *,
    for_outliers: bool = False,
    blocks: Sequence[Block] = (),
) -> list[tuple[RescalePass, Place]]:
    """Return the places of every pass that the recipe asks for, in the order of ``PASSES``.

    Args:
        module: a folded program; left as it is.
        section: the recipe's ``quantize`` section.
        generated: names of the generated kernels.
        for_outliers: also those of passes that mend outliers without being asked for.
        blocks: inverted-residual blocks that a kernel of ours computes: nothing is inserted inside of one.
    """
    inside = {node for block in blocks for node in block.nodes}
    places: list[tuple[RescalePass, Place]] = []
    for rescale_pass in PASSES:
        is_on = rescale_pass.is_on(section)
        if is_on or (for_outliers and rescale_pass.mends_outliers):
            taken = inside.union(*(place.activations for _, place in places))
            found = rescale_pass.find(module, Scope(section, generated, taken, blocks))
            places += [(rescale_pass, replace(place, for_outliers=not is_on)) for place in found]
    return places


def rescale_channels(
    module: fx.GraphModule,
    places: Sequence[tuple[RescalePass, Place]],
    maxima: Mapping[fx.Node, Tensor],
) -> tuple[dict[str, Tensor], set[fx.Node]]:
    """Rescale every place where that pays; return the factors of the inserted Muls, and the changed layers.

    Exact but for one float32 rounding per weight. An activation of zeros has no range and is left alone.

    Args:
        module: a folded program; changed in place.
        places: from ``find_places``.
        maxima: largest absolute value of each channel of their activations, (C,), from ``channel_maxima``.
    """
    factors: dict[str, Tensor] = {}
    changed: set[fx.Node] = set()
    for rescale_pass, place in places:
        largest = [maxima[node] for node in place.activations]
        if not all(channels.max() > 0 for channels in largest):
            continue
        if place.for_outliers and not any(find_outliers(channels).any() for channels in largest):
            continue
        up = _choose_factors(module, rescale_pass, place, largest)
        if rescale_pass.pays(module, place, up):
            inserted = rescale_pass.rescale(module, place, up)
            changed.update(place.layers)
            if inserted is not None:
                factors[place.tensor] = inserted
    module.recompile()
    return factors, changed


def _choose_factors(
    module: fx.GraphModule, rescale_pass: RescalePass, place: Place, largest: Sequence[Tensor]
) -> Tensor:
    """Return the factors of a place: with outliers apart where there are any, and that lowers the error."""
    up = channel_factors(largest, place.limit)
    if rescale_pass.error is None or not any(find_outliers(channels).any() for channels in largest):
        return up
    apart = channel_factors(largest, place.limit, outliers_count=False)
    errors = [rescale_pass.error(module, place, factors, largest[-1]) for factors in (apart, up)]
    return apart if errors[0] < errors[1] else up
