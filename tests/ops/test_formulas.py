"""Each op's formula.h, compiled by g++ alone, against the oracle; every tensor between poisoned bands."""

from __future__ import annotations

import shutil

import pytest
import torch
from drivers import DriverStoppedError, Job, build_formula_driver, run_jobs
from kernel_check import with_defaults
from op_calls import OPS, OpCall
from random_calls import describe, random_call
from torch import Tensor

from edgedyn.targets import native

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
FORMULAS = sorted(path.parent.name for path in native.SOURCES.glob("*/formula.h"))


@pytest.fixture(scope="module")
def driver():
    return build_formula_driver("address,undefined")


def discrepancies(driver, calls: list[OpCall]) -> list[str]:
    results = run_jobs(driver, [call.formula_job() for call in calls])
    found = [(call, call.discrepancy(result)) for call, result in zip(calls, results, strict=True)]
    return [f"{describe(call)}: {wrong}" for call, wrong in found if wrong]


# double is read as float32, and half exactly: the same rounding bound holds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_formula_equals_the_oracle_at_every_output_of_every_example(name, dtype, driver):
    op = OPS[name]
    examples = [with_defaults(op, args) for args in op.examples()]
    typed = [tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args) for args in examples]
    assert discrepancies(driver, [OpCall(op, args) for args in typed]) == []


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_equals_the_oracle_at_random_shapes_and_special_values(name, driver):
    calls = [random_call(name, 1, index) for index in range(0, 60, 2)]
    assert discrepancies(driver, calls) == []


@pytest.mark.parametrize("bend", ["relu", "relu6"])
def test_activation_keeps_nan(bend, driver):
    x = torch.tensor([[[[float("nan"), -1, 0, 7]]]])
    args = (x, torch.ones(1, 1, 1, 1), None, torch.ones(1, 1, 1, 4), 1, 0, 1, 1, bend)
    assert discrepancies(driver, [OpCall(OPS["masked_conv2d"], args)]) == []


def masked_job(mask_rows: int) -> Job:
    x, weight, y = torch.ones(1, 2, 4, 5), torch.ones(3, 2, 1, 1), torch.zeros(1, 3, 4, 5)
    return Job("masked_conv2d", (x, weight, None, torch.ones(1, 1, mask_rows, 5), 1, 0, 1, 1, "none", y))


def test_reading_behind_a_tensor_is_seen(driver):
    assert run_jobs(driver, [masked_job(4)])[0].y is not None
    with pytest.raises(DriverStoppedError, match="AddressSanitizer: use-after-poison") as stopped:
        run_jobs(driver, [masked_job(4), masked_job(3)])
    assert stopped.value.index == 1


def test_every_op_has_a_formula():
    assert sorted(OPS) == FORMULAS
