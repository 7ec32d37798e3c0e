"""INT8 against float by made-up times: what is given to which layer, and what is better left in float."""

from __future__ import annotations

import numpy as np
import pytest

from edgedyn.bench.speed import Times, attribute, compare, run_in_turns
from edgedyn.errors import BundleError
from edgedyn.targets import Events

TRACE = [
    {"conversion": ["body", "head"]},
    {"layer": "head", "int8": True, "shape": [1, 8, 4, 6], "multiply_adds": 100},
    {"layer": "body", "int8": True, "shape": [1, 8, 4, 6], "multiply_adds": 200},
    {"conversion": ["body"]},
    {"conversion": []},
    {"layer": "tail", "int8": False, "shape": [1, 3, 4, 6], "multiply_adds": 300},
]


def trace_of(*layers: str):
    return [{"layer": name, "int8": True, "shape": [1, 2, 3, 4], "multiply_adds": 1} for name in layers]


def ran(*operators: float | str, whole: float = 9.0) -> Events:
    """A run of operators in order: numbers are layers, texts conversions."""
    kinds = [("conversion" if isinstance(x, str) else "layer", float(x)) for x in operators]
    return Events(whole, tuple(kinds))


def times(whole=10.0, conversions=None, **layers) -> Times:
    """Times of four runs, evenly spread by 1 % about the given median."""

    def spread(ms):
        return ms * np.array([0.99, 0.995, 1.005, 1.01])

    return Times(
        spread(whole),
        {name: spread(ms) for name, ms in layers.items()},
        {name: spread(ms) for name, ms in (conversions or {}).items()},
    )


def compare_one(float32: Times, int8: Times, trace):
    return compare({"forward": float32}, {"forward": int8}, {"forward": trace})


def test_a_shared_conversion_counts_in_equal_parts():
    found = attribute([ran("0.4", 1.0, 2.0, "0.5", "0.6", 3.0)], TRACE)
    assert found.of("head").tolist() == [1.0 + 0.2]
    assert found.of("body").tolist() == [2.0 + 0.2 + 0.5]
    assert found.of("tail").tolist() == [3.0]
    assert found.whole.tolist() == [9.0]


def test_runs_stay_apart():
    runs = [ran("0.4", 1.0, 2.0, "0.5", "0.6", 3.0), ran("0", 4.0, 5.0, "0", "0", 6.0, whole=8.0)]
    found = attribute(runs, TRACE)
    assert found.of("head").tolist() == [1.2, 4.0]
    assert found.whole.tolist() == [9.0, 8.0]


def test_conversions_that_the_runtime_joins_are_shared_out_between_the_same_layers():
    found = attribute([ran("0.4", 1.0, 2.0, "0.6", 3.0)], TRACE)
    assert found.of("head").tolist() == [1.2]
    assert found.of("body").tolist() == [2.0 + 0.2 + 0.3]
    found = attribute([ran(1.0, 2.0, "0.5", "0.6", 3.0)], TRACE)
    assert (found.of("head").tolist(), found.of("body").tolist()) == ([1.0], [2.5])


@pytest.mark.parametrize("odd", [ran("0.4", 1.0, 2.0), ran(1.0, 2.0, 3.0, 4.0)])
def test_other_layers_than_lowered_are_refused(odd):
    with pytest.raises(BundleError, match=r"the runtime reports \d layers; expected \d"):
        attribute([ran(1.0, 2.0, 3.0), odd], TRACE)


def test_layer_is_slower_where_operator_and_conversions_together_are():
    float32 = times(head=1.0, body=1.0, tail=1.0)
    int8 = times(head=0.5, body=0.5, tail=1.0, conversions={"head": 0.4, "body": 0.6})
    found = compare_one(float32, int8, TRACE)
    assert [(row.layer, row.is_slower) for row in found.layers] == [
        ("head", False),
        ("body", True),
        ("tail", False),
    ]
    assert found.layers[1].int8_ms == pytest.approx(1.1)
    assert found.layers[1].conversion_ms == pytest.approx(0.6)
    assert found.layers[1].shape == (1, 8, 4, 6)
    assert found.keep_float == ["body"]


def test_float_layer_is_never_slower_in_int8():
    found = compare_one(times(head=1.0, body=1.0, tail=1.0), times(head=0.5, body=0.5, tail=2.0), TRACE)
    assert found.slower == []
    assert [row.layer for row in found.int8_layers] == ["head", "body"]


def test_times_whose_quartiles_overlap_tell_nothing():
    trace = trace_of("head")
    found = compare_one(times(head=1.0), times(head=1.005), trace)
    assert found.slower == []
    assert compare_one(times(head=1.0), times(head=1.03), trace).slower


def test_suggestion_names_a_layer_once_for_all_its_calls_and_programs():
    float32 = times(first=1.0, second=1.0)
    float32.layers["first#2"] = float32.layers["first"]
    int8 = times(first=1.2, second=1.1)
    int8.layers["first#2"] = int8.layers["first"]
    trace = trace_of("first", "second", "first#2")
    assert compare_one(float32, int8, trace).keep_float == ["first", "second"]
    # its first call wins more than the second loses
    int8.layers["first"] = int8.layers["first"] / 2
    found = compare_one(float32, int8, trace)
    assert {row.layer for row in found.slower} == {"first#2", "second"}
    assert found.keep_float == ["second"]


def test_slowest_comes_first_and_what_saves_nothing_is_not_suggested():
    float32 = times(whole=1000.0, a=1.0, b=1.0, c=1.0)
    int8 = times(whole=1000.0, a=1.05, b=6.0, c=3.5)
    found = compare_one(float32, int8, trace_of("a", "b", "c"))
    assert [row.layer for row in found.slower] == ["b", "c", "a"]
    assert found.keep_float == ["b", "c"]  # a: 0.05 ms of 1000


def test_other_layers_in_float_are_refused():
    with pytest.raises(BundleError, match=r"differ in the layers \['body', 'neck'\]"):
        compare_one(times(neck=1.0), times(body=1.0), trace_of("body"))


def test_json_holds_every_layer_and_the_whole():
    found = compare_one(times(whole=3.0, head=1.0), times(whole=2.0, head=0.5), trace_of("head")).to_json()
    assert found["runs"] == 4
    assert found["float_ms"]["forward"] == pytest.approx(3.0)
    assert found["int8_ms"]["forward"] == pytest.approx(2.0)
    assert found["layers"][0]["shape"] == [1, 2, 3, 4]
    assert found["layers"][0]["is_int8"] is True


class Counting:
    """Notes when it is run."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def run(self, *arrays: np.ndarray) -> None:
        self.order.append(f"{self.name}{arrays[0]}")

    def read(self) -> list[Events]:
        return [Events(float(k), ()) for k in range(self.order.count(f"{self.name}7"))]


def test_programs_run_in_turns_and_the_first_runs_do_not_count():
    order: list[str] = []
    jobs = [(Counting("a", order), [np.int64(7)]), (Counting("b", order), [np.int64(7)])]
    told: list[tuple[int, int]] = []
    first, second = run_in_turns(
        jobs, runs=2, warm_up=1, progress=lambda done, total: told.append((done, total))
    )
    assert order == ["a7", "b7"] * 3
    assert [run.whole for run in first] == [run.whole for run in second] == [1.0, 2.0]
    assert told == [(1, 3), (2, 3), (3, 3)]
