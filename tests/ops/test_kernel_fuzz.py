"""Every ExecuTorch kernel at random and at boundary sizes: each instruction set, sanitizers, threads.

tools/fuzz_ops.py draws more of the same, for as long as one likes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from boundary_calls import boundary_calls
from drivers import (
    DriverStoppedError,
    Result,
    build_kernel_driver,
    instruction_sets,
    run_kernels,
    run_sanitized,
)
from op_calls import OpCall
from random_calls import DRAWS, describe, random_call

from edgedyn.targets import native

SEED, COUNT = 0, 50
OPS = [name for name in DRAWS if (native.SOURCES / name / "kernel_executorch.cpp").is_file()]
every_op = pytest.mark.parametrize("name", OPS)


pytestmark = pytest.mark.usefixtures("library")


@functools.cache
def calls_of(name: str) -> tuple[OpCall, ...]:
    return (*(random_call(name, SEED, index) for index in range(COUNT)), *boundary_calls(name))


def assert_right(calls: tuple[OpCall, ...], results: list[Result], where: str) -> None:
    wrong = [(call, call.discrepancy(result)) for call, result in zip(calls, results, strict=True)]
    assert [f"{where}, {describe(call)}: {words}" for call, words in wrong if words] == []


@every_op
def test_kernel_equals_the_oracle_on_every_instruction_set(name):
    jobs = [call.kernel_job() for call in calls_of(name)]
    for target in instruction_sets(build_kernel_driver()):
        assert_right(calls_of(name), run_kernels(jobs, target=target), target)


@every_op
def test_kernel_computes_the_same_with_any_number_of_threads(name):
    jobs = [call.kernel_job() for call in calls_of(name)]
    results = [run_kernels(jobs, threads=threads) for threads in (1, 2, 3)]
    for call, one, two, three in zip(calls_of(name), *results, strict=True):
        assert one.y.tobytes() == two.y.tobytes() == three.y.tobytes(), describe(call)


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizer_finds_nothing(sanitize):
    calls = tuple(call for name in OPS for call in calls_of(name))
    try:
        results = run_sanitized([call.kernel_job() for call in calls], sanitize, threads=3)
    except DriverStoppedError as stopped:
        if "unexpected memory mapping" in stopped.words:
            pytest.skip(f"Linux spreads addresses wider than this sanitizer knows: {stopped.words}")
        pytest.fail(f"{describe(calls[stopped.index])}: {stopped.words}")
    assert_right(calls, results, sanitize)


@every_op
def test_random_calls_reach_bad_input(name):
    calls = calls_of(name)[:COUNT]
    shapes = [call.args[0].shape for call in calls]
    tensors = [[a for a in call.args if isinstance(a, torch.Tensor)] for call in calls]
    assert any(shape[0] == 0 for shape in shapes)
    assert any(shape[2] == 1 for shape in shapes)
    assert any(shape[3] == 1 for shape in shapes)
    assert any(call.shift for call in calls)
    assert any(not torch.isfinite(a).all() for group in tensors for a in group)
    assert {call.is_int8 for call in calls} == {True, False}


def test_random_grids_are_at_times_larger_than_the_image():
    shapes = [(call.args[0].shape, call.args[1].shape) for call in calls_of("sliced_depthwise2d")[:COUNT]]
    assert any(grid[2] > x[2] and grid[3] > x[3] for x, grid in shapes)


def test_random_masked_convolutions_take_both_paths():
    depthwise = [call.args[7] == call.args[0].shape[1] > 1 for call in calls_of("masked_conv2d")[:COUNT]]
    assert 5 < sum(depthwise) < COUNT - 5


def test_same_number_is_the_same_call():
    one, again, other = (random_call(OPS[0], 3, index) for index in (4, 4, 6))
    assert describe(one) == describe(again) != describe(other)
    assert all(torch.equal(a, b) for a, b in zip(one.args[:2], again.args[:2], strict=True))
