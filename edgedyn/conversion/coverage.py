"""Coverage: the outcomes of a network's decisions that occur on the calibration samples.

    variant   argmax of the router's logits; or whether a sample fits the capacity variant
    mask      logits reach the threshold at one position at least
    density   active share of all mask positions of a sample, in bands: low < share <= high

The decisions are those of the float network, before calibration. An outcome that never occurs has no
statistics: its INT8 ranges would be those of zeros, or of other images. So a recipe with trained weights is
refused where an outcome has too few samples; the error names the samples that come nearest.

A variant is calibrated on its own samples where there are enough (``own``), else on all: ranges of other
images are too wide and waste resolution, but ranges of too few images clip, which costs far more.
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
    from edgedyn.images.sample import Sample
    from edgedyn.recipe.keys import CoverageSection

_NAMED = 3  # outcomes, and samples nearest to each, that a refusal names


@dataclass(frozen=True)
class Coverage:
    """Decisions of the float network on the calibration samples.

    Attributes:
        outcomes: every outcome of every decision, with its number of samples.
        logits: program -> the logits behind its decisions, as entries of the calibration table.
        chosen: program -> indices of its calibration samples.
    """

    outcomes: tuple[Outcome, ...]
    logits: Mapping[str, tuple[Entry, ...]]
    chosen: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Met:
    """An outcome and its samples.

    Attributes:
        outcome: with its counts.
        taken: (samples,) booleans, on which samples it occurs.
        missing: (samples,) distance of each sample from the outcome.
        distances: these distances in words, for the error.
        sources: names of the samples.
    """

    outcome: Outcome
    taken: np.ndarray
    missing: np.ndarray
    distances: Sequence[str]
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
    """Measure the decisions of a float network on the calibration samples.

    Args:
        canonical: the network, routed or not.
        programs: its float programs, by name.
        observed: for each sample, program -> inputs.
        drawn: the samples, for their names.
        section: ``quantize.coverage`` of the recipe.
        is_trained: whether the network has weights; without, no outcome is demanded.

    Raises:
        CalibrationError: when an outcome occurs on fewer samples than demanded; for a sample whose logits are
            NaN or infinite.
        RecipeError: when a pattern of ``section.unused`` matches no mask.
    """
    needed = section.samples if is_trained else 0
    sources = [f"{s.source} at sigma {s.sigma:g}" if s.sigma else s.source for s in drawn]
    capacity = _capacity_variant(canonical)
    variants, logits = _measure_variants(canonical, capacity, observed, sources, needed)
    own = {m.outcome.name: tuple(np.flatnonzero(m.taken).tolist()) for m in variants}
    chosen = dict.fromkeys(programs, tuple(range(len(observed))))
    chosen |= {k: v for k, v in own.items() if len(v) >= section.own and capacity in ("", k)}
    met = [*variants]
    for name, program in programs.items():
        if name == capacity or not find_decisions(program)[0]:
            continue  # masks of the capacity variant are those of the dense one, which always fits
        samples = [(sources[i], observed[i][name]) for i in chosen[name]]
        prefix = f"{name}: " if variants and not capacity else ""
        masks, compared = _measure_masks(program, samples, section, needed, prefix)
        met += masks
        logits[name] = (*logits.get(name, ()), *compared)  # a router may have masks, too
    _refuse_unknown(met, section.unused)
    _refuse_unmet(met, needed)
    return Coverage(tuple(m.outcome for m in met), logits, chosen)


def _capacity_variant(canonical: nn.Module) -> str:
    """Return the name of the capacity variant; empty for a network without one."""
    if isinstance(canonical, RoutedModel) and canonical.router is None:
        return next(iter(canonical.variants))
    return ""


def _measure_variants(
    canonical: nn.Module,
    capacity: str,
    observed: Sequence[Mapping[str, tuple[Tensor, ...]]],
    sources: Sequence[str],
    needed: int,
) -> tuple[list[_Met], dict[str, tuple[Entry, ...]]]:
    """Return the outcomes of routing, one per variant, and the router's logits; none without variants."""
    if not isinstance(canonical, RoutedModel):
        return [], {}
    if capacity:
        return _measure_capacity(canonical, [x[capacity] for x in observed], sources), {}
    met, logits = _measure_routes(canonical, [x[ROUTER] for x in observed], sources, needed)
    return met, {ROUTER: logits}


def _measure_routes(
    model: RoutedModel, inputs: Sequence[tuple[Tensor, ...]], sources: Sequence[str], needed: int
) -> tuple[list[_Met], tuple[Entry, ...]]:
    """Return the outcomes of a router, one per variant, and its logits."""
    histograms: dict[str, Histogram] = {}
    rows = []
    for x, source in zip(inputs, sources, strict=True):
        with torch.no_grad():
            rows.append(model.route(*x)[0].numpy()[0])
        count(histograms, "logits", rows[-1], f"{source}, 'logits'")
    scores = np.array(rows)
    picked, outcomes = scores.argmax(1), []
    for k, name in enumerate(model.variants):
        taken, missing = picked == k, scores.max(1) - scores[:, k]
        outcome = Outcome("variant", name, int(taken.sum()), len(sources), needed)
        distances = [f"its logit is {d:.3g} below the best" for d in missing]
        outcomes.append(_Met(outcome, taken, missing, distances, sources))
    return outcomes, _entries(histograms)


def _measure_capacity(
    model: RoutedModel, inputs: Sequence[tuple[Tensor, ...]], sources: Sequence[str]
) -> list[_Met]:
    """Return two outcomes: a sample fits the capacity variant, or needs the dense one.

    Neither is demanded, because both variants compute the same.
    """
    capacity, dense = model.variants
    with torch.no_grad():
        overflow = np.array([float(model.variants[capacity](*x)[1].max()) for x in inputs])
    distances = [f"{count:g} positions too many" for count in overflow]
    return [
        _Met(
            Outcome("variant", name, int(taken.sum()), len(sources)), taken, abs(overflow), distances, sources
        )
        for name, taken in ((capacity, overflow <= 0), (dense, overflow > 0))
    ]


def _measure_masks(
    program: ExportedProgram,
    samples: Sequence[tuple[str, tuple[Tensor, ...]]],
    section: CoverageSection,
    needed: int,
    prefix: str,
) -> tuple[list[_Met], tuple[Entry, ...]]:
    """Return the outcomes of a program's masks and density bands, and the masks' logits.

    Args:
        program: a float program with masks.
        samples: (name, inputs) of each sample.
        section: ``quantize.coverage`` of the recipe.
        needed: number of samples that each outcome needs.
        prefix: put before the name of each outcome.
    """
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
    outcomes = []
    for k, name in enumerate(names):
        taken = shares[:, k] > 0
        span = float(shares[:, k].min()), float(shares[:, k].max())
        demanded = 0 if matches(name, section.unused) else needed
        outcome = Outcome("mask", prefix + name, int(taken.sum()), len(sources), demanded, *span)
        distances = [f"its nearest logit is {d:.3g} from the threshold" for d in missing[:, k]]
        outcomes.append(_Met(outcome, taken, missing[:, k], distances, sources))
    outcomes += _sort_into_bands(prefix, active.sum(1) / sizes.sum(1), section.bands, sources, needed)
    return outcomes, _entries(histograms)


def _name_masks(masks: Sequence[Mask]) -> list[str]:
    """Name each mask by the module that compares; ``#2`` follows for its second comparison."""
    return number_repeats(mask.path or "(the network)" for mask in masks)


def _sort_into_bands(
    prefix: str, shares: np.ndarray, bands: Sequence[float], sources: Sequence[str], needed: int
) -> list[_Met]:
    distances = [f"{share:.1%} active" for share in shares]
    outcomes = []
    for low, high in pairwise(bands):
        taken = (low < shares) & (shares <= high)
        name = f"{prefix}{100 * low:g}-{100 * high:g}%"
        outcome = Outcome("density", name, int(taken.sum()), len(shares), needed)
        outcomes.append(_Met(outcome, taken, np.maximum(low - shares, shares - high), distances, sources))
    return outcomes


def _entries(histograms: Mapping[str, Histogram]) -> tuple[Entry, ...]:
    return tuple(Entry(name, "decision", histogram) for name, histogram in histograms.items())


def _refuse_unknown(met: Sequence[_Met], unused: Sequence[str]) -> None:
    """Refuse a pattern of unused masks that matches no mask."""
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
    missing = "; ".join(_describe(m) for m in unmet[:_NAMED]) + more
    kinds = {m.outcome.decision for m in unmet}
    ways = (
        ", state the densities that the network has (quantize.coverage.bands)" if "density" in kinds else ""
    )
    ways += ", name the masks that training left empty (quantize.coverage.unused)" if "mask" in kinds else ""
    raise CalibrationError(
        f"{len(met) - len(unmet)} of {len(met)} decision outcomes occur in at least {needed} calibration "
        f"samples (quantize.coverage.samples). Missing: {missing}. Add images like the nearest, at more "
        f"crops and noise levels{ways}, or lower the limit (0 disables the check)."
    )


def _describe(met: _Met) -> str:
    """Return the samples of an outcome, and those that come nearest."""
    o = met.outcome
    others = [i for i in np.argsort(met.missing, kind="stable") if not met.taken[i]][:_NAMED]
    nearest = ", ".join(f"{met.sources[i]} ({met.distances[i]})" for i in others)
    count = f"{o.decision} {o.name} has {o.taken} of {o.samples} samples"
    return f"{count}, nearest are {nearest}" if nearest else f"{count}, and the set has no more"


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return rows of the report: the number of samples per outcome; of all masks, only the rarest one."""
    masks = [o for o in outcomes if o.decision == "mask"]
    masks.sort(key=lambda o: (not o.needed, o.taken))  # demanded ones first
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
