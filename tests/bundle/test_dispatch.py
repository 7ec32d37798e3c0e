"""Routed programs where they run: numpy alone, the rule of the manifest, whatever computes the parts."""

from __future__ import annotations

import numpy as np
import pytest

from edgedyn.bundle.dispatch import Decision, Dispatcher
from edgedyn.bundle.manifest import Routing
from edgedyn.errors import BundleError

ARGMAX = Routing("argmax", "router", ("small", "large"))
FALLBACK = Routing("fallback", "", ("quick", "dense"))
X = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)


def routed(*logits: float, carried: tuple[np.ndarray, ...] = ()) -> Dispatcher:
    runs = {
        "router": lambda x: [np.array([logits], np.float32), *carried],
        "small": lambda x: [x + 1],
        "large": lambda x: [x + 2],
    }
    return Dispatcher(runs, ARGMAX)


def quick(overflow: float) -> Dispatcher:
    runs = {"quick": lambda x: [x + 1, np.array([overflow], np.float32)], "dense": lambda x: [x + 2]}
    return Dispatcher(runs, FALLBACK)


def test_one_program_runs_without_a_decision():
    outputs, decision = Dispatcher({"forward": lambda x, g: [x + g, x]}).run(X, X)
    assert decision is None
    assert np.array_equal(outputs[0], 2 * X)
    assert len(outputs) == 2


@pytest.mark.parametrize(("logits", "index"), [((0.5, 0.25), 0), ((-3.0, -1.0), 1)])
def test_largest_logit_picks_the_variant(logits, index):
    outputs, decision = routed(*logits).run(X)
    assert np.array_equal(outputs[0], X + 1 + index)
    assert decision.index == index
    assert decision.margin == pytest.approx(abs(logits[0] - logits[1]))


def test_variants_take_what_the_router_carries():
    (y,) = routed(1, 0, carried=(10 * X,))(X)
    assert np.array_equal(y, 10 * X + 1)


def test_forced_variant_runs_and_the_decision_is_told():
    outputs, decision = routed(1, 0).run(X, forced=1)
    assert np.array_equal(outputs[0], X + 2)
    assert decision.index == 0


@pytest.mark.parametrize(("overflow", "index"), [(0, 0), (3, 1), (np.nan, 1)])
def test_overflow_falls_back_to_the_dense_variant(overflow, index):
    outputs, decision = quick(overflow).run(X)
    assert np.array_equal(outputs[0], X + 1 + index)
    assert len(outputs) == 1
    assert decision.index == index
    assert np.array_equal(decision.margin, overflow, equal_nan=True)


@pytest.mark.parametrize("forced", [0, 1])
def test_forced_fallback(forced):
    outputs, _ = quick(1 - forced).run(X, forced=forced)
    assert np.array_equal(outputs[0], X + 1 + forced)


@pytest.mark.parametrize("logits", [(1.0,), (1.0, 2.0, 3.0), (np.nan, 1.0)])
def test_router_that_does_not_fit_is_refused(logits):
    with pytest.raises(BundleError, match=r"for 2 variants \(small, large\); expected one finite logit each"):
        routed(*logits)(X)


def test_margin_of_three_logits_is_best_minus_second():
    assert Decision(2, np.array([1.0, 4.0, 9.0])).margin == 5.0
