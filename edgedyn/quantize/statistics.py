"""What the tensors of a program are on calibration samples: one histogram each, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgedyn.errors import CalibrationError
from edgedyn.histogram import Histogram


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
    for index, sample in enumerate(samples):
        source = sources[index] if sources else f"sample {index}"
        for name, histogram in _observe_one(module, names, sample, source).items():
            found[name] = found[name] + histogram if name in found else histogram
        progress(index + 1, len(samples))
    return found


def _observe_one(
    module: fx.GraphModule, names: Mapping[fx.Node, str], sample: tuple[Tensor, ...], source: str
) -> dict[str, Histogram]:
    found = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in names:
                try:
                    found[names[n]] = Histogram.of(value.numpy())
                except CalibrationError as error:
                    raise CalibrationError(f"{source}, tensor {names[n]!r}: {error}") from error
            return value

    with torch.no_grad():
        Observer(module).run(*sample)
    return found
