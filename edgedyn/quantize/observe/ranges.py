"""Range estimators: the interval of a tensor that the 256 INT8 values cover.

    minmax       all values
    percentile   all but the share (100 - p) / 2 % of the values at either end
    mse          the interval with the least mean squared error of rounding and clipping
    entropy      the interval whose quantized distribution is nearest to the true one (Kullback-Leibler)

Each takes a histogram and returns (low, high); ``choose_qparams`` turns them into a scale and a zero point.
The interval always contains zero, which pads convolutions and must be exact. Where the zero point is 0, the
interval is symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from edgedyn.quantize.observe.histogram import Histogram

_LEVELS = 256
_CANDIDATES = 64  # widths that mse and entropy try, evenly between the full range and half of it
_SMALLEST = 2.0**-100  # smallest divisor
# Smallest scale: a ReLU may leave nothing but zeros. ``observe.requantize`` raises it behind large inputs.
_FINEST = 2.0**-16


def minmax(histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Return the interval of all values."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def percentile(histogram: Histogram, *, symmetric: bool, share: float) -> tuple[float, float]:
    """Return the interval without the rarest values at either end.

    Args:
        histogram: of a tensor.
        symmetric: return a symmetric interval.
        share: share of the values inside the interval, percent; in (50, 100].
    """
    outside = histogram.total * (100 - share) / 200
    cumulative = np.cumsum(histogram.counts)
    low = histogram.edges[int(np.searchsorted(cumulative, outside, side="right"))]
    high = histogram.edges[int(np.searchsorted(cumulative, histogram.total - outside, side="left")) + 1]
    inside = replace(histogram, low=max(float(low), histogram.low), high=min(float(high), histogram.high))
    return minmax(inside, symmetric=symmetric)


def mse(histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Return the interval with the least mean squared error of quantization."""
    return min(_candidates(histogram, symmetric), key=lambda interval: _squared_error(histogram, *interval))


def entropy(histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Return the interval with the least Kullback-Leibler divergence (Migacz, "8-bit inference", 2017)."""
    return min(_candidates(histogram, symmetric), key=lambda interval: _divergence(histogram, *interval))


ESTIMATORS: Mapping[str, Callable[..., tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def choose_qparams(low: float, high: float, *, symmetric: bool) -> tuple[float, int]:
    """Return the scale, a float32 value, and the zero point of int8 for an interval that holds 0."""
    if symmetric:
        return max(float(np.float32(max(-low, high) / 127)), _FINEST), 0
    scale = max(float(np.float32((high - low) / 255)), _FINEST)
    return scale, int(np.clip(round(-128 - low / scale), -128, 127))


def _candidates(histogram: Histogram, symmetric: bool) -> list[tuple[float, float]]:
    """Return narrower versions of the full interval: both ends shrunk together, and each end alone."""
    low, high = minmax(histogram, symmetric=symmetric)
    shares = np.linspace(1, 0.5, _CANDIDATES)
    intervals = [(low * share, high * share) for share in shares]
    if not symmetric and low < 0 < high:
        intervals += [(low * share, high) for share in shares] + [(low, high * share) for share in shares]
    return intervals


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Return the mean squared error of rounding to 256 levels and clipping to the interval.

    A bin may be as wide as the scale: values inside the interval count as uniform, scale^2 / 12.
    """
    scale = (high - low) / (_LEVELS - 1)
    x = histogram.centers
    beyond = np.maximum(np.maximum(low - x, x - high), 0)
    error = np.where(beyond > 0, beyond**2, scale**2 / 12)
    return float((histogram.counts * error).sum() / histogram.total)


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    """Return the divergence of the clipped distribution from the same distribution on 256 levels.

    In the first, clipped values count at the ends. In the second, a level spreads the values inside the
    interval evenly over its bins that held any.
    """
    x, counts = histogram.centers, histogram.counts.astype(np.float64)
    inside = (counts > 0) & (x >= low) & (x <= high)
    if not inside.any():
        return math.inf
    clipped = counts[inside].copy()
    level = np.round((x[inside] - low) / max(high - low, _SMALLEST) * (_LEVELS - 1)).astype(np.int64)
    members, totals = np.bincount(level), np.bincount(level, weights=clipped)
    spread = totals[level] / members[level]
    clipped[0] += counts[x < low].sum()
    clipped[-1] += counts[x > high].sum()
    p, q = clipped / clipped.sum(), spread / spread.sum()
    return float((p * np.log(p / q)).sum())
