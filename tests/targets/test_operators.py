"""The layer of each operator of a lowered program, compared with the profile of the real runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.bench.speed import attribute
from edgedyn.errors import TargetMissingError
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets.executorch.profile import Profiled

TARGET = targets.load("executorch")
SHAPE = (1, 3, 16, 24)


class Kinds(nn.Module):
    """Convolutions that XNNPACK runs by operators of different names, chained, shared and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.left, self.also, self.right = (
            nn.Conv2d(8, 3, 3, padding=1),
            nn.Conv2d(8, 3, 1),
            nn.Conv2d(3, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.depthwise(torch.relu(self.full(x))))  # one to the next in INT8
        y = torch.tanh(self.point(torch.tanh(self.point(y))))  # float between the calls
        return x + self.also(y) + self.right(self.left(y))


CALLS = ["full", "depthwise", "point", "point#2", "left", "also", "right"]
OPERATORS = {"full": "IGEMM", "depthwise": "DWConv", "left": "IGEMM"}  # of 1x1: Fully Connected


def sample(seed: int) -> tuple[Tensor, ...]:
    return (torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)),)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The network in each precision: (trace, path)."""
    torch.manual_seed(4)
    program = torch.export.export(Kinds().eval(), sample(1))
    made = {"fp32": quantize.to_float(program, sample(1), "fp32").program}
    for precision, dynamic in {"int8": [], "dynamic": ["*"]}.items():
        made[precision] = quantize_program(
            program,
            sample(1),
            scheme=TARGET.int8,
            section=QuantizeSection(
                rounding="nearest", equalize=False, keep_float=["right"], dynamic=dynamic
            ),
            samples=[sample(2)],
        ).program
    results = {}
    for precision, ready in made.items():
        folder = tmp_path_factory.mktemp(precision)
        artifact = TARGET.lower({"forward": ready}, folder, precision)
        results[precision] = artifact.facts["operators"]["forward"], folder / "model.pte"
    return results


def layers(trace):
    return [row for row in trace if "layer" in row]


def conversions(trace):
    return [row["conversion"] for row in trace if "conversion" in row]


def run(path, times: int = 1) -> Profiled:
    profiled = TARGET.profile(path, "forward")
    for _ in range(times):
        profiled.run(sample(3)[0].numpy())
    return profiled


@pytest.mark.parametrize("precision", ["fp32", "int8", "dynamic"])
def test_every_call_of_a_layer_is_named_once_in_the_order_of_the_runtime(lowered, precision):
    trace, path = lowered[precision]
    names = [row["layer"] for row in layers(trace)]
    assert sorted(names) == sorted(CALLS)
    (operators,) = [block for block in run(path).read_operators() if len(block) > 2]
    actual = [name for name, _ in operators if name.startswith(("Convolution", "Fully Connected"))]
    expected = [OPERATORS.get(name, "Fully Connected") for name in names]
    assert len(actual) == len(expected)
    for name, kind, said in zip(names, expected, actual, strict=True):
        assert kind in said, f"{name}: {said}"


def test_trace_says_what_is_int8_and_what_the_recipe_keeps(lowered):
    assert not any(row["int8"] for row in layers(lowered["fp32"][0]))
    for precision in ("int8", "dynamic"):
        kept = {row["layer"] for row in layers(lowered[precision][0]) if not row["int8"]}
        assert kept == {"right"}


def test_shapes_and_multiply_adds_are_those_of_the_layers(lowered):
    pixels = SHAPE[2] * SHAPE[3]
    for trace, _ in lowered.values():
        found = {row["layer"]: (row["shape"], row["multiply_adds"]) for row in layers(trace)}
        assert found["full"] == ([1, 8, 16, 24], 3 * 9 * 8 * pixels)
        assert found["depthwise"] == ([1, 8, 16, 24], 9 * 8 * pixels)
        assert found["point#2"] == ([1, 8, 16, 24], 8 * 8 * pixels)
        assert found["left"] == ([1, 3, 16, 24], 8 * 9 * 3 * pixels)


def test_conversions_belong_to_the_layers_that_they_are_made_for(lowered):
    # full takes its input from float and hands INT8 to depthwise, which hands it to point; left and also
    # read one INT8 activation; right reads the output of left in float
    found = conversions(lowered["int8"][0])
    assert found[:4] == [["full"], ["point"], ["point#2"], ["point#2"]]
    assert sorted(found[4:]) == [["also"], ["also", "left"], ["left"]]
    assert conversions(lowered["fp32"][0]) == []
    # each dense layer finds its input range per image; depthwise, which cannot, is float on both sides
    found = conversions(lowered["dynamic"][0])
    assert found == [["full"], ["depthwise"], ["depthwise"], ["point"], ["point#2"], ["also", "left"]]


@pytest.mark.parametrize("precision", ["fp32", "int8", "dynamic"])
def test_runtime_tells_as_many_operators_as_the_trace_names(lowered, precision):
    trace, path = lowered[precision]
    events = run(path, times=3).read()
    assert len(events) == 3
    found = attribute(events, trace)
    assert set(found.layers) == set(CALLS)
    assert (found.whole > 0).all()
    # parts take no longer than the whole; times of operators are whole microseconds
    parts = sum(found.layers.values()) + sum(found.conversions.values(), np.zeros(3))
    assert (parts <= found.whole + 1e-3 * len(trace)).all()


def test_runtime_that_tells_nothing_is_refused(lowered):
    with pytest.raises(TargetMissingError, match="without its event tracer"):
        run(lowered["fp32"][1], times=0).read()
