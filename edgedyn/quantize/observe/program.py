"""Ranges of a folded program's tensors: rescale channels, observe on samples, choose each range."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from edgedyn.graph.blocks import Block
from edgedyn.graph.nodes import bias_of, module_path, weight_of
from edgedyn.quantize.fake_quantize import round_weight
from edgedyn.quantize.observe.histogram import Histogram
from edgedyn.quantize.observe.ranges import ESTIMATORS, choose_qparams
from edgedyn.quantize.observe.requantize import raise_scales
from edgedyn.quantize.observe.statistics import ChannelPeaks, channel_maxima, observe
from edgedyn.quantize.plan import (
    QuantizableLayer,
    find_kernels,
    find_quantizable_layers,
    name_tensors,
)
from edgedyn.quantize.progress import Progress, silent
from edgedyn.quantize.rescale.generated import ContentMeter
from edgedyn.quantize.rescale.passes import find_places, rescale_channels
from edgedyn.quantize.rescale.place import find_outliers
from edgedyn.quantize.table.entries import Entry, Kind

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection


_WEAKEST = 2.0**-12  # smallest range of a weight's channel, as a share of the largest: zeros get a scale too
_SHOWN = 4  # channels
_WIDTHS = np.linspace(1, 0.6, 41)  # shares of a channel's largest weight that ``mse`` tries as its range


@dataclass(frozen=True)
class Observed:
    """Ranges and rescaled constants of a folded program, before rounding: the same for every plan.

    Attributes:
        entries: its tensors, in the order of its graph.
        constants: weights and biases that the rescale passes changed, float32, by name.
    """

    entries: tuple[Entry, ...]
    constants: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        """Return one line with counts; the values are in the fields."""
        return f"Observed({len(self.entries)} tensors, {len(self.constants)} changed constants)"


def observe_program(
    module: fx.GraphModule,
    *,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    sources: Sequence[str] = (),
    generated: Collection[str] = frozenset(),
    blocks: Sequence[Block] = (),
    progress: Progress = silent,
) -> Observed:
    """Rescale a folded program, observe it on calibration samples and choose the range of every tensor.

    Args:
        module: changed in place where channels are rescaled.
        section: the recipe's ``quantize`` section.
        samples: inputs of the program.
        sources: origin of each sample, for errors.
        generated: names of the generated kernels.
        blocks: its blocks that a kernel of ours computes, from ``blocks_of``.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        CalibrationError: for a sample that brings NaN or infinite values to a tensor.
    """
    places = find_places(module, section, generated, for_outliers=True, blocks=blocks)
    kernels = find_kernels(module, generated)  # before a Mul stands behind one
    meter = ContentMeter(kernels)
    activations = {node for _, place in places for node in place.activations}
    maxima = channel_maxima(module, activations, samples, dict.fromkeys(meter.names, meter.add))
    factors, changed = rescale_channels(module, places, maxima)
    layers = find_quantizable_layers(module, blocks)
    peaks = ChannelPeaks(layer.input_node for layer in layers)
    constants = _changed_constants(module, [layer for layer in layers if layer.node in changed])
    histograms = observe(
        module,
        {**name_tensors(module, layers), **kernels},
        samples,
        sources=sources,
        also=dict.fromkeys(peaks.nodes, peaks.add),
        progress=lambda done, total: progress("observe", done, total),
    )
    entries = {
        name: _entry(name, "kernel" if name in generated else "feature", histogram, section)
        for name, histogram in histograms.items()
    }
    entries |= {
        name: replace(entries[name], spread=(content.spread, content.between_images))
        for name, content in meter.read().items()
    }
    entries |= {name: replace(entries[name], channels=tuple(x.tolist())) for name, x in factors.items()}
    for layer in layers:
        sharing = [other for other in layers if layer.input in (other.input, other.output)]
        note = _describe_outliers(sharing, peaks.read(layer.input_node), section)
        entries[layer.input] = replace(entries[layer.input], note=note)
    entries |= {layer.weight: _weight_entry(module, layer, section) for layer in layers}
    ends = {block.stages[-1].conv for block in blocks}  # their outputs are float
    entries |= raise_scales(entries, [layer for layer in layers if layer.node not in ends])
    return Observed(tuple(entries.values()), constants)


def _entry(name: str, kind: Kind, histogram: Histogram, section: QuantizeSection) -> Entry:
    method = section.ranges.kernel if kind == "kernel" else section.ranges.feature
    options = {"share": section.ranges.percentile} if method == "percentile" else {}
    affine = choose_qparams(*ESTIMATORS[method](histogram, symmetric=False, **options), symmetric=False)
    symmetric, _ = choose_qparams(*ESTIMATORS[method](histogram, symmetric=True, **options), symmetric=True)
    return Entry(name, kind, histogram, method, affine, symmetric)


def _describe_outliers(layers: Sequence[QuantizableLayer], largest: Tensor, section: QuantizeSection) -> str:
    """Describe the outliers left in a tensor that layers write or read, with the setting that mends them.

    Where a Mul in front of the layers pays, it is there already, whatever ``equalize_inputs`` says.
    """
    found = find_outliers(largest)
    if not found.any():
        return ""
    ratio = float(largest.max() / largest[largest > 0].median())
    names = ", ".join(module_path(layer.node) or layer.name for layer in layers)
    setting = f"quantize.keep_float: [{names}]" if section.equalize else "quantize.equalize: true"
    channels = ", ".join(map(str, found.nonzero().flatten().tolist()[:_SHOWN]))
    return (
        f"outlier channels ({channels}): up to {ratio:.0f} times as large as the median channel, which "
        f"leaves the others few INT8 values; {setting} mends that"
    )


def _weight_entry(module: fx.GraphModule, layer: QuantizableLayer, section: QuantizeSection) -> Entry:
    weight = weight_of(module, layer.node)
    flat = weight.flatten(1).double()
    largest = flat.abs().amax(1)
    if section.ranges.weight == "percentile":  # torch.quantile takes 16 million values at most
        largest = torch.from_numpy(np.percentile(flat.abs().numpy(), section.ranges.percentile, axis=1))
    largest = largest.clamp(min=float(largest.max()) * _WEAKEST or _WEAKEST)
    scales = largest / 127
    if section.ranges.weight == "mse":
        candidates = [largest * share / 127 for share in _WIDTHS]
        errors = torch.stack([_rounding_error(flat, scale) for scale in candidates])
        scales = torch.stack(candidates).gather(0, errors.argmin(0)[None])[0]
    channels = tuple(float(scale) for scale in scales.float())
    return Entry(
        layer.weight, "weight", Histogram.of(weight.numpy()), section.ranges.weight, channels=channels
    )


def _rounding_error(weight: Tensor, scales: Tensor) -> Tensor:
    return ((weight - round_weight(weight, scales)) ** 2).sum(1)


def _changed_constants(module: fx.GraphModule, layers: Sequence[QuantizableLayer]) -> dict[str, np.ndarray]:
    constants = {layer.weight: weight_of(module, layer.node).numpy() for layer in layers}
    biases = {layer.bias: bias_of(module, layer.node) for layer in layers}
    return constants | {name: bias.numpy() for name, bias in biases.items() if bias is not None}
