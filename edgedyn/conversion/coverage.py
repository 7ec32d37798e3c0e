"""Which outcomes of a network's decisions the calibration samples meet: variants, masks, densities.

    variant   argmax of the router's logits; or whether the quick variant holds a sample
    mask      logits reach the threshold at one position at least
    density   active share of all mask positions of a sample, in bands: low < share <= high

Measured with the float network, before anything is calibrated. What no sample decides has no statistics: its
INT8 ranges would be those of zeros, or of other images. So a recipe of trained weights is refused, with the
samples that come nearest.

A variant is calibrated on the samples that pick it, where they are enough (``own``), else on all: ranges of
other images waste steps, but ranges of too few images clip, which costs far more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgedyn.bundle.manifest import ROUTER
from edgedyn.errors import CalibrationError, RecipeError, nearest
from edgedyn.graph.nodes import number_repeats
from edgedyn.layers import RoutedModel
from edgedyn.quantize.deciding import Mask, find_decisions
from edgedyn.quantize.observe.histogram import Histogram
from edgedyn.quantize.observe.statistics import count, look
from edgedyn.quantize.plan import matches
from edgedyn.quantize.table.entries import Entry, Outcome
from edgedyn.report.rows import Row

if TYPE_CHECKING:
    from edgedyn.images.image_set import Sample
    from edgedyn.recipe.keys import CoverageSection

_NAMED = 3  # outcomes, and samples nearest to each, that a refusal names


@dataclass(frozen=True)
class Coverage:
    """What the calibration samples decide.

    Attributes:
        outcomes: of every decision, how often it is met.
        logits: program -> what its decisions compare, as entries of the calibration table.
        chosen: program -> indices of the samples that it is calibrated on.
    """

    outcomes: tuple[Outcome, ...]
    logits: Mapping[str, tuple[Entry, ...]]
    chosen: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Met:
    """An outcome, which samples take it, and how far the others are from it, also in words."""

    outcome: Outcome
    taken: np.ndarray
    missing: np.ndarray
    told: Sequence[str]
    sources: Sequence[str]


def cover(
    canonical: nn.Module,
    programs: Mapping[str, ExportedProgram],
    observed: Sequence[Mapping[str, tuple[Tensor, ...]]],
    *,
    drawn: Sequence[Sample],
    section: CoverageSection,
    is_trained: bool,
) -> Coverage:
    """Measure what a float network decides on the calibration samples.

    Args:
        canonical: the network, routed or not.
        programs: its parts, before they are quantized.
        observed: of each sample what each part takes.
        drawn: the samples, for their names.
        recipe: ``quantize.coverage`` says what is demanded.

    Raises:
        CalibrationError: when fewer samples than demanded meet an outcome, for trained weights; for a sample
            whose logits are NaN or infinite.
    """
    needed = section.samples if is_trained else 0
    sources = [f"{s.source} at sigma {s.sigma:g}" if s.sigma else s.source for s in drawn]
    chosen = dict.fromkeys(programs, tuple(range(len(observed))))
    met: list[_Met] = []
    logits: dict[str, tuple[Entry, ...]] = {}
    quick = ""
    if isinstance(canonical, RoutedModel):
        if canonical.router is None:
            quick = next(iter(canonical.variants))  # its masks are those of the other, which is always right
            met = _ask_quick(canonical, [x[quick] for x in observed], sources)
        else:
            met, logits[ROUTER] = _ask_router(canonical, [x[ROUTER] for x in observed], sources, needed)
        own = {m.outcome.name: tuple(np.flatnonzero(m.taken).tolist()) for m in met}
        chosen |= {k: v for k, v in own.items() if len(v) >= section.own and quick in ("", k)}
    for name, program in programs.items():
        if name != quick and find_decisions(program)[0]:
            samples = [(sources[i], observed[i][name]) for i in chosen[name]]
            front = f"{name}: " if met and not quick else ""
            found, compared = _look_at_masks(program, samples, section, needed, front)
            met += found
            logits[name] = (*logits.get(name, ()), *compared)  # a router may have masks, too
    _refuse_unknown(met, section.unused)
    _refuse_unmet(met, needed)
    return Coverage(tuple(m.outcome for m in met), logits, chosen)


def _ask_router(
    model: RoutedModel, inputs: Sequence[tuple[Tensor, ...]], sources: Sequence[str], needed: int
) -> tuple[list[_Met], tuple[Entry, ...]]:
    """Ask a router for the variant of every sample."""
    histograms: dict[str, Histogram] = {}
    rows = []
    for x, source in zip(inputs, sources, strict=True):
        with torch.no_grad():
            rows.append(model.route(*x)[0].numpy()[0])
        count(histograms, "logits", rows[-1], f"{source}, 'logits'")
    scores = np.array(rows)
    picked, found = scores.argmax(1), []
    for k, name in enumerate(model.variants):
        taken, missing = picked == k, scores.max(1) - scores[:, k]
        outcome = Outcome("variant", name, int(taken.sum()), len(sources), needed)
        told = [f"its logit is {d:.3g} below the best" for d in missing]
        found.append(_Met(outcome, taken, missing, told, sources))
    return found, _entries(histograms)


def _ask_quick(
    model: RoutedModel, inputs: Sequence[tuple[Tensor, ...]], sources: Sequence[str]
) -> list[_Met]:
    """Ask a quick variant which samples it holds; nothing is demanded: both variants compute the same."""
    quick, dense = model.variants
    with torch.no_grad():
        overflow = np.array([float(model.variants[quick](*x)[1].max()) for x in inputs])
    told = [f"{count:g} positions too many" for count in overflow]
    return [
        _Met(Outcome("variant", name, int(taken.sum()), len(sources)), taken, abs(overflow), told, sources)
        for name, taken in ((quick, overflow <= 0), (dense, overflow > 0))
    ]


def _look_at_masks(
    program: ExportedProgram,
    samples: Sequence[tuple[str, tuple[Tensor, ...]]],
    section: CoverageSection,
    needed: int,
    front: str,
) -> tuple[list[_Met], tuple[Entry, ...]]:
    """Run a program on named samples; see where its masks are active, and how much of all of them."""
    module, masks = program.module(check_guards=False), find_decisions(program)[0]
    assert isinstance(module, fx.GraphModule)
    names = _name_masks(masks)
    nodes = {n: [k for k, mask in enumerate(masks) if mask.logits == n.name] for n in module.graph.nodes}
    compared = {node: of for node, of in nodes.items() if of}
    histograms: dict[str, Histogram] = {}
    active, sizes, missing = (np.zeros((len(samples), len(masks))) for _ in range(3))
    for i, (source, x) in enumerate(samples):

        def see(node: fx.Node, value: Tensor, i: int = i, source: str = source) -> None:
            logits = value.numpy()
            for k in compared[node]:
                name = f"{names[k]}.logits"
                count(histograms, name, logits, f"{source}, {name!r}")
                active[i, k], sizes[i, k] = masks[k].decide(logits).sum(), logits.size
                missing[i, k] = np.abs(logits - masks[k].threshold).min()

        look(module, compared, x, see)
    sources, shares = [source for source, _ in samples], active / sizes
    found = []
    for k, name in enumerate(names):
        taken = shares[:, k] > 0
        span = float(shares[:, k].min()), float(shares[:, k].max())
        asked = 0 if matches(name, section.unused) else needed
        outcome = Outcome("mask", front + name, int(taken.sum()), len(sources), asked, *span)
        told = [f"its nearest logit is {d:.3g} from the threshold" for d in missing[:, k]]
        found.append(_Met(outcome, taken, missing[:, k], told, sources))
    found += _sort_into_bands(front, active.sum(1) / sizes.sum(1), section.bands, sources, needed)
    return found, _entries(histograms)


def _name_masks(masks: Sequence[Mask]) -> list[str]:
    """Name masks by the module that compares; ``#2`` follows where it compares again."""
    return number_repeats(mask.path or "(the network)" for mask in masks)


def _sort_into_bands(
    front: str, shares: np.ndarray, bands: Sequence[float], sources: Sequence[str], needed: int
) -> list[_Met]:
    found, told = [], [f"{share:.1%} active" for share in shares]
    for low, high in pairwise(bands):
        taken = (low < shares) & (shares <= high)
        name = f"{front}{100 * low:g}-{100 * high:g}%"
        outcome = Outcome("density", name, int(taken.sum()), len(shares), needed)
        found.append(_Met(outcome, taken, np.maximum(low - shares, shares - high), told, sources))
    return found


def _entries(histograms: Mapping[str, Histogram]) -> tuple[Entry, ...]:
    return tuple(Entry(name, "decision", histogram) for name, histogram in histograms.items())


def _refuse_unknown(met: Sequence[_Met], unused: Sequence[str]) -> None:
    """Refuse a pattern of masks without demands that matches no mask."""
    masks = [m.outcome.name.split(": ")[-1] for m in met if m.outcome.decision == "mask"]
    for pattern in unused:
        if not any(matches(name, [pattern]) for name in masks):
            raise RecipeError(
                f"quantize.coverage.unused: {pattern!r} matches no mask; {nearest(pattern, masks)}"
                "the network's are "
                f"{', '.join(masks) or 'none'}. Fix the pattern."
            )


def _refuse_unmet(met: Sequence[_Met], needed: int) -> None:
    unmet = [m for m in met if m.outcome.taken < m.outcome.needed]
    if not unmet:
        return
    more = f"; and {len(unmet) - _NAMED} more" if len(unmet) > _NAMED else ""
    told = "; ".join(_tell(m) for m in unmet[:_NAMED]) + more
    kinds = {m.outcome.decision for m in unmet}
    states = ", or state the densities that the network has (quantize.coverage.bands)"
    leaves = ", or name the masks that training left empty (quantize.coverage.unused)"
    raise CalibrationError(
        f"the calibration set feeds {len(met) - len(unmet)} of {len(met)} outcomes of what the network "
        f"decides; the recipe demands {needed} samples of each (quantize.coverage.samples). {told}. "
        f"Add images like the nearest, at more crops and noise levels{states if 'density' in kinds else ''}"
        f"{leaves if 'mask' in kinds else ''}, or demand fewer samples; 0 demands nothing."
    )


def _tell(met: _Met) -> str:
    """Say how often an outcome was met, and which samples come nearest."""
    o = met.outcome
    others = [i for i in np.argsort(met.missing, kind="stable") if not met.taken[i]][:_NAMED]
    nearest = ", ".join(f"{met.sources[i]} ({met.told[i]})" for i in others)
    said = f"{o.decision} {o.name} has {o.taken} of {o.samples} samples"
    return f"{said}, nearest are {nearest}" if nearest else f"{said}, and the set has no more"


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return how often each outcome was met, as rows of the report; of the masks the one met least."""
    masks = [o for o in outcomes if o.decision == "mask"]
    masks.sort(key=lambda o: (not o.needed, o.taken))  # those that something is asked of come first
    shown = [*(o for o in outcomes if o.decision != "mask"), *masks[:1]]
    return [
        Row(
            "decisions",
            "coverage[mask]" if o.decision == "mask" else f"coverage[{o.decision}={o.name}]",
            o.taken,
            {"at_least": float(o.needed)} if o.needed else {},
            o.samples,
        )
        for o in shown
    ]
