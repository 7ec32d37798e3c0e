"""Histograms that do not depend on the order or the batches of the values.

    bin i counts the x with  i * step <= x < (i + 1) * step,    step a power of two

When values need more than ``MOST_BINS`` bins, the step doubles and bins i = 2 j and 2 j + 1 become bin j.
floor(floor(x) / 2) = floor(x / 2), so that merged bins are exactly those of one pass with the final step:
samples in any order, in batches of any size, on any machine, give the same table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedyn.errors import CalibrationError

MOST_BINS = 1024
_FINEST = 2.0**-40  # spread of a tensor of zeros
_BLOCK = 2**16  # values counted at once: the intermediate arrays stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of the values of one tensor over all samples.

    Attributes:
        low: smallest value.
        high: largest value.
        step: width of a bin, a power of two.
        first: index of the first bin, which begins at ``first * step``.
        counts: int64, of consecutive bins; at most ``MOST_BINS``.
    """

    low: float
    high: float
    step: float
    first: int
    counts: np.ndarray

    def __repr__(self) -> str:
        """Return one line; the counts are in their field."""
        return (
            f"Histogram({self.total} values from {self.low:.4g} to {self.high:.4g}, {self.counts.size} bins)"
        )

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """Count the values of an array of any shape.

        Raises:
            CalibrationError: for an empty array, or a value that is NaN or infinite.
        """
        flat = np.asarray(values, np.float32).ravel()
        if flat.size == 0:
            raise CalibrationError("no values to count; a histogram needs at least one. Give it samples.")
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int(np.count_nonzero(~np.isfinite(flat)))
            raise CalibrationError(
                f"{bad} of {flat.size} values are NaN or infinite; a range needs finite ones. "
                "Find the image or the layer that makes them."
            )
        step = _step(low, high)
        first = math.floor(low / step)
        counts = np.zeros(math.floor(high / step) - first + 1, np.int64)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            # Division by a power of two is exact, so that a value on an edge falls into the same bin as after
            # a merge. For a step above 1, tiny float32 values are exact in float64 only.
            bins = np.floor(block / np.float32(step) if step <= 1 else block.astype(np.float64) / step)
            counts += np.bincount((bins - first).astype(np.int64), minlength=counts.size)
        return cls(low, high, step, first, counts)

    def __add__(self, other: Histogram) -> Histogram:
        """Count the values of both."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        step = max(self.step, other.step, _step(low, high))
        a, b = self._coarsen(step), other._coarsen(step)
        first = min(a.first, b.first)
        end = max(a.first + a.counts.size, b.first + b.counts.size)
        counts = np.zeros(end - first, np.int64)
        for part in (a, b):
            counts[part.first - first : part.first - first + part.counts.size] += part.counts
        return Histogram(low, high, step, first, counts)

    def _coarsen(self, step: float) -> Histogram:
        """Return the same counts in bins of a larger step."""
        ratio = round(step / self.step)
        if ratio == 1:
            return self
        first = self.first // ratio
        bins = (self.first + np.arange(self.counts.size)) // ratio - first
        counts = np.bincount(bins, weights=self.counts).astype(np.int64)
        return Histogram(self.low, self.high, step, first, counts)

    @property
    def total(self) -> int:
        """Number of counted values."""
        return int(self.counts.sum())

    @property
    def edges(self) -> np.ndarray:
        """Lower edge of each bin, and the upper edge of the last; float64."""
        return np.asarray((self.first + np.arange(self.counts.size + 1)) * self.step)

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin, within the smallest and the largest value; float64."""
        return np.asarray(((self.edges[:-1] + self.edges[1:]) / 2).clip(self.low, self.high))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        counts = [int(count) for count in self.counts]
        return {"low": self.low, "high": self.high, "step": self.step, "first": self.first, "counts": counts}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Histogram:
        """Return the histogram of JSON values from ``to_json``."""
        counts = np.asarray(values["counts"], np.int64)
        return cls(values["low"], values["high"], values["step"], values["first"], counts)


def _step(low: float, high: float) -> float:
    """Return the least power of two in which the values need no more than ``MOST_BINS`` bins."""
    spread = max(high - low, max(abs(low), abs(high)) * 2.0**-24, _FINEST)  # float32 resolves no more
    step = float(2.0 ** math.floor(math.log2(spread / MOST_BINS)))
    while math.floor(high / step) - math.floor(low / step) >= MOST_BINS:
        step *= 2
    return step
