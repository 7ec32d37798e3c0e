"""Statistics of a program's tensors on calibration samples: histograms and channel maxima."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgedyn.errors import CalibrationError
from edgedyn.graph.nodes import channel_axis, shape_of
from edgedyn.quantize.observe.histogram import Histogram


def look(
    module: fx.GraphModule,
    nodes: Collection[fx.Node],
    sample: tuple[Tensor, ...],
    see: Callable[[fx.Node, Tensor], None],
) -> None:
    """Run a program on one sample and call ``see(node, value)`` for each node, in the graph's order."""

    class Looking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                see(n, value)
            return value

    with torch.no_grad():
        Looking(module).run(*sample)


def observe(
    module: fx.GraphModule,
    tensors: Mapping[str, fx.Node],
    samples: Sequence[tuple[Tensor, ...]],
    *,
    sources: Sequence[str] = (),
    also: Mapping[fx.Node, Callable[[fx.Node, Tensor], None]] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Histogram]:
    """Return one histogram per tensor over all samples; their order and batches do not matter.

    Args:
        module: a folded float program.
        tensors: the observed nodes, by name.
        samples: inputs of the program.
        sources: origin of each sample, for errors; by default its number.
        also: further observers by observed node, called with the node and its value.
        progress: called with (samples seen, samples).

    Raises:
        CalibrationError: for NaN or infinite values, naming sample and tensor.
    """
    names: dict[fx.Node, list[str]] = {}
    for name, node in tensors.items():
        names.setdefault(node, []).append(name)
    histograms: dict[str, Histogram] = {}
    source = ""

    def see(node: fx.Node, value: Tensor) -> None:
        for name in names[node]:
            count(histograms, name, value.numpy(), f"{source}, tensor {name!r}")
        if node in also:
            also[node](node, value)

    for index, sample in enumerate(samples):
        source = sources[index] if sources else f"sample {index}"
        look(module, names, sample, see)
        progress(index + 1, len(samples))
    return histograms


def count(histograms: dict[str, Histogram], name: str, values: np.ndarray, where: str) -> None:
    """Add values to the histogram of a name.

    Raises:
        CalibrationError: for NaN or infinite values; the message begins with ``where``.
    """
    try:
        histogram = Histogram.of(values)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error
    histograms[name] = histograms[name] + histogram if name in histograms else histogram


class ChannelPeaks:
    """Finds the largest absolute value of each channel of activations, one sample after another.

    Args:
        nodes: activations, (B, C, H, W), or (..., C) behind a linear layer.
    """

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.nodes = tuple(dict.fromkeys(nodes))
        self._axes = {node: channel_axis(node.meta["val"]) for node in self.nodes}
        self._largest = {node: torch.zeros(shape_of(node)[axis]) for node, axis in self._axes.items()}

    def add(self, node: fx.Node, value: Tensor) -> None:
        """Add the activation of one sample."""
        others = [axis for axis in range(value.dim()) if axis != self._axes[node]]
        high, low = value.amax(others), value.amin(others)  # abs would copy the activation
        self._largest[node] = torch.maximum(self._largest[node], torch.maximum(high, -low))

    def read(self, node: fx.Node) -> Tensor:
        """Return the largest absolute value of each channel, (C,)."""
        return self._largest[node]


def channel_maxima(
    module: fx.GraphModule,
    activations: Collection[fx.Node],
    samples: Sequence[tuple[Tensor, ...]],
    also: Mapping[fx.Node, Callable[[fx.Node, Tensor], None]] = MappingProxyType({}),
) -> dict[fx.Node, Tensor]:
    """Return the largest absolute value of each channel of activations over all samples, (C,).

    Args:
        module: a folded float program.
        activations: its nodes, (B, C, H, W), or (..., C) behind a linear layer.
        samples: its inputs.
        also: further observers by node, called with the node and its value in the same pass.
    """
    peaks = ChannelPeaks(activations)

    def see(node: fx.Node, value: Tensor) -> None:
        if node in activations:
            peaks.add(node, value)
        if node in also:
            also[node](node, value)

    nodes = {*activations, *also}
    for sample in samples if nodes else ():
        look(module, nodes, sample, see)
    return {node: peaks.read(node) for node in activations}
