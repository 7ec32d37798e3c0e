"""Histograms: every value is counted where it belongs, whatever the order and the batches."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgedyn.errors import CalibrationError
from edgedyn.quantize.observe.histogram import MOST_BINS, Histogram

FLOATS = st.floats(-1e6, 1e6, width=32)


def equal(a: Histogram, b: Histogram) -> bool:
    return a.to_json() == b.to_json()


@given(arrays(np.float32, st.integers(1, 300), elements=FLOATS), st.integers(1, 7), st.randoms())
@settings(deadline=None, max_examples=200)
def test_batches_and_their_order_make_no_difference(values, batches, random):
    parts = [part for part in np.array_split(values, batches) if part.size]
    random.shuffle(parts)
    total = Histogram.of(parts[0])
    for part in parts[1:]:
        total = total + Histogram.of(part)
    assert equal(total, Histogram.of(values))


@given(arrays(np.float32, st.integers(1, 300), elements=FLOATS))
@settings(deadline=None, max_examples=200)
def test_every_value_lies_in_its_bin(values):
    histogram = Histogram.of(values)
    edges = histogram.edges
    expected = [np.count_nonzero((values >= a) & (values < b)) for a, b in itertools.pairwise(edges)]
    assert histogram.counts.tolist() == expected
    assert histogram.total == values.size
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert histogram.counts.size <= MOST_BINS
    assert histogram.counts[0] > 0
    assert histogram.counts[-1] > 0


def test_bins_are_as_fine_as_they_may_be():
    histogram = Histogram.of(np.linspace(-1, 3, 10_000))
    assert histogram.step == 2.0**-7  # 4 / 2^-8 would be 1025 bins: both ends are inside one
    assert histogram.counts.size == 513


@pytest.mark.parametrize("value", [0.0, 1e-30, -7.25, 1e30])
def test_tensor_of_one_value_has_one_bin(value):
    histogram = Histogram.of(np.full(5, value))
    assert histogram.counts.tolist() == [5]
    assert histogram.centers.tolist() == [np.float32(value)]


LEAST = float(np.finfo(np.float32).smallest_subnormal)


@pytest.mark.parametrize(
    "values",
    [
        [-LEAST, 2e6],  # divided by a step above 1, it would be 0 in float32
        [-LEAST, 2.0**-21],  # by a very fine one, the large value is an index of a bin all the same
        [2.0**-21, 3e38, -3e38],
        [-(2.0**-149), LEAST, 1.0],
    ],
)
def test_values_next_to_nothing_fall_where_exact_division_puts_them(values):
    flat = np.array(values, np.float32)
    histogram = Histogram.of(flat)
    bins = [math.floor(Fraction(float(x)) / Fraction(histogram.step)) - histogram.first for x in flat]
    assert histogram.counts.tolist() == np.bincount(bins).tolist()


def test_json_keeps_everything():
    histogram = Histogram.of(np.random.default_rng(0).standard_normal((3, 4, 5)))
    assert equal(Histogram.from_json(json.loads(json.dumps(histogram.to_json()))), histogram)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([]), "no values to count"),
        (np.array([1, np.nan, 2]), "1 of 3 values are NaN or infinite"),
        (np.array([np.inf, -np.inf]), "2 of 2 values are NaN or infinite"),
    ],
)
def test_what_has_no_range_is_refused(values, words):
    with pytest.raises(CalibrationError, match=words):
        Histogram.of(values)
