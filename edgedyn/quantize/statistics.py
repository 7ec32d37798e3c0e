"""What the tensors of a program are on calibration samples: one histogram each, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgedyn.errors import CalibrationError
from edgedyn.histogram import Histogram


def look(
    module: fx.GraphModule,
    nodes: Collection[fx.Node],
    sample: tuple[Tensor, ...],
    see: Callable[[fx.Node, Tensor], None],
) -> None:
    """Run a program on one sample and call ``see(node, value)`` for each of the nodes, in their order."""

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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Histogram]:
    """Count the values of tensors over all samples; their order and batches do not matter.

    Args:
        module: a folded float program.
        tensors: what is observed, by name.
        samples: inputs of the program.
        sources: where each sample comes from, for errors; by default its number.
        progress: called with (samples seen, samples).

    Raises:
        CalibrationError: when a sample brings NaN or infinite values: it is named.
    """
    names = {node: name for name, node in tensors.items()}
    found: dict[str, Histogram] = {}
    source = ""

    def count(node: fx.Node, value: Tensor) -> None:
        name = names[node]
        try:
            histogram = Histogram.of(value.numpy())
        except CalibrationError as error:
            raise CalibrationError(f"{source}, tensor {name!r}: {error}") from error
        found[name] = found[name] + histogram if name in found else histogram

    for index, sample in enumerate(samples):
        source = sources[index] if sources else f"sample {index}"
        look(module, names, sample, count)
        progress(index + 1, len(samples))
    return found
