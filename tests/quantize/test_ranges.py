"""Range estimators, on distributions whose best range is known."""

from __future__ import annotations

import numpy as np
import pytest

from edgedyn.quantize.observe.histogram import Histogram
from edgedyn.quantize.observe.ranges import ESTIMATORS, choose_qparams, entropy, minmax, mse, percentile

NORMAL = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
OUTLIER = np.append(NORMAL, np.float32(60))


def squared_error(values: np.ndarray, interval: tuple[float, float], *, symmetric: bool) -> float:
    scale, zero = choose_qparams(*interval, symmetric=symmetric)
    quantized = np.clip(np.round(values / scale) + zero, -128, 127)
    return float(np.mean(((quantized - zero) * scale - values) ** 2))


def run(name: str, values: np.ndarray, *, symmetric: bool) -> tuple[float, float]:
    options = {"share": 99.9} if name == "percentile" else {}
    return ESTIMATORS[name](Histogram.of(values), symmetric=symmetric, **options)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("values", [NORMAL, np.abs(NORMAL), -np.abs(NORMAL) - 1, np.zeros(9)], ids=str)
def test_interval_holds_zero_and_lies_in_the_range(name, symmetric, values):
    low, high = run(name, values, symmetric=symmetric)
    full_low, full_high = minmax(Histogram.of(values), symmetric=symmetric)
    assert full_low <= low <= 0 <= high <= full_high
    assert not symmetric or low == -high


def test_minmax_is_the_range_with_zero():
    assert minmax(Histogram.of(NORMAL), symmetric=False) == (NORMAL.min(), NORMAL.max())
    assert minmax(Histogram.of(NORMAL + 9), symmetric=False) == (0, NORMAL.max() + 9)
    assert minmax(Histogram.of(-np.abs(NORMAL)), symmetric=True) == (-abs(NORMAL).max(), abs(NORMAL).max())


@pytest.mark.parametrize("share", [60.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_keeps_its_share(share):
    low, high = percentile(Histogram.of(NORMAL), symmetric=False, share=share)
    inside = np.mean((low <= NORMAL) & (high >= NORMAL)) * 100
    one_bin = 2 * 0.4 * Histogram.of(NORMAL).step * 100  # at either end, at the highest density
    assert share <= inside <= share + one_bin


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_at_least_as_good_as_all_values_and_drops_an_outlier(symmetric):
    for values in (NORMAL, OUTLIER, np.abs(OUTLIER)):
        full = squared_error(values, run("minmax", values, symmetric=symmetric), symmetric=symmetric)
        best = squared_error(values, run("mse", values, symmetric=symmetric), symmetric=symmetric)
        assert best <= full * 1.01  # bins are not points
    few = np.append(NORMAL[:5000], np.float32(60))
    assert (
        mse(Histogram.of(np.tile(few, 400)), symmetric=False)[1] == 60
    )  # two in ten thousand are no outlier
    assert mse(Histogram.of(np.append(np.tile(NORMAL, 20), np.float32(20))), symmetric=False)[1] < 20


def test_entropy_drops_a_long_tail_and_keeps_a_flat_distribution():
    tail = np.append(np.tile(NORMAL, 5), np.linspace(6, 40, 200, dtype=np.float32))
    assert entropy(Histogram.of(tail), symmetric=False)[1] < 30
    flat = np.random.default_rng(2).uniform(0, 1, 300_000)
    assert entropy(Histogram.of(flat), symmetric=False)[1] > 0.97


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (-5.0, 0.0), (0.0, 0.0), (-1e-30, 1e-30)])
def test_step_reaches_both_ends_and_holds_zero_exactly(low, high):
    scale, zero = choose_qparams(low, high, symmetric=False)
    assert scale == np.float32(scale) > 0
    assert -128 <= zero <= 127
    # rounding of the zero point moves both ends by half a scale at most; a scale is 2^-16 at least
    assert (-128 - zero) * scale <= low + 0.51 * scale
    assert (127 - zero) * scale >= high - 0.51 * scale
    symmetric, nothing = choose_qparams(low, high, symmetric=True)
    assert nothing == 0
    assert 127 * symmetric == pytest.approx(max(-low, high, 0), rel=2.0**-23, abs=127 * 2.0**-16)
