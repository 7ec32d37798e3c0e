"""The ExecuTorch kernels refuse unsupported calls with the reason, and compute small and empty ones."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from drivers import Job, run_kernels, run_sanitized
from executorch.runtime import Runtime
from kernel_check import with_defaults
from lowered_calls import Calls, lower_call, lower_calls
from op_calls import OPS, OpCall, to_int8
from refused_calls import GOOD, REFUSED
from torch import Tensor

from edgedyn.errors import BundleError, ModelError
from edgedyn.targets import native
from edgedyn.targets.executorch.run import load

HAVE = [name for name in GOOD if (native.SOURCES / name / "kernel_executorch.cpp").is_file()]
every_op = pytest.mark.parametrize("name", HAVE)


pytestmark = pytest.mark.usefixtures("library")


def good_call(name: str, *, is_int8: bool = False) -> OpCall:
    call = OpCall(OPS[name], with_defaults(OPS[name], GOOD[name]))
    return to_int8(call) if is_int8 else call


def changed_job(name: str, changes: dict[str, Any]) -> Job:
    """Return a good call in which some arguments have other values; scales are for the INT8 variant."""
    is_int8 = any("_scale" in change or "_zero_point" in change for change in changes)
    job = good_call(name, is_int8=is_int8).kernel_job()
    packet = getattr(torch.ops.edgedyn, f"{name}_int8" if is_int8 else name)
    names = [argument.name for argument in packet.out._schema.arguments]
    assert set(changes) <= set(names)
    values = (changes.get(word, value) for word, value in zip(names, job.values, strict=True))
    return job._replace(values=tuple(values))


REFUSED_CALLS = [
    pytest.param(name, words, changes, id=f"{name}-{words[:40]}")
    for name, refusals in ((name, REFUSED[name]) for name in HAVE)
    for words, changes in refusals.items()
]


@pytest.mark.parametrize(("name", "words", "changes"), REFUSED_CALLS)
def test_broken_precondition_is_refused_with_its_words(name, words, changes):
    pattern = re.escape(words).replace("%ld", "-?\\d+")
    results = run_kernels([changed_job(name, change) for change in changes])
    assert [result.y for result in results] == [None] * len(changes)
    assert [result.message for result in results if not re.search(pattern, result.message)] == []


@every_op
def test_every_precondition_in_the_source_is_broken_by_a_call(name):
    """Each text in a check; those of a helper are joined to it by %s."""
    source = (native.SOURCES / name / "kernel_executorch.cpp").read_text()
    texts = r'return "(expected .+?)";|nullptr : "(expected .+?)"|EDGEDYN_CHECK\((.+?);\n'
    checks = re.findall(texts, source, re.S)
    found = [a or b or "".join(re.findall(r'"(.*?)"', c, re.S)).split(": ", 1)[1] for a, b, c in checks]
    assert set(found) - {"%s"} == set(REFUSED[name])
    assert source.count("EDGEDYN_CHECK(") == sum(bool(c) for _, _, c in checks)


@every_op
def test_good_call_next_to_the_broken_ones_is_computed(name):
    for call in (good_call(name), good_call(name, is_int8=True)):
        assert call.discrepancy(run_kernels([call.kernel_job()])[0]) == ""


def test_refusing_reads_and_writes_nothing_that_it_may_not():
    refused = (case.values for case in REFUSED_CALLS)
    jobs = [changed_job(name, change) for name, _, changes in refused for change in changes]
    assert [result.y for result in run_sanitized(jobs, "address,undefined")] == [None] * len(jobs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bend", ["relu", "relu6"])
def test_activation_keeps_nan_where_the_mask_is_set(bend, groups):
    x = torch.rand(1, 2, 1, 9) * 20 - 10
    x[0, 1, 0, 3:5] = float("nan")
    mask = torch.ones(1, 1, 1, 9)
    mask[..., 4] = 0
    args = (x, torch.ones(2, 2 // groups, 1, 1), None, mask, 1, 0, 1, groups, bend)
    call = OpCall(OPS["masked_conv2d"], args)
    assert np.isnan(call.exact).sum() == 2 // groups
    assert call.discrepancy(run_kernels([call.kernel_job()])[0]) == ""


def small_args(name: str, batch: int) -> tuple[Any, ...]:
    """Return arguments whose extents are 1, but for the batch and a grid larger than the image."""
    one, block = torch.rand(batch, 1, 1, 1), []
    for side in (1, 3, 1):
        block += [torch.randn(1, 1, side, side), torch.randn(1), None]
    return {
        "sliced_depthwise2d": (one, torch.randn(batch, 9, 4, 5), torch.randn(batch, 1, 4, 5), 3),
        "decoupled_depthwise2d": (one, torch.randn(batch, 9, 1, 1), torch.randn(batch, 9, 1, 1), 3),
        "atom_depthwise2d": (one, torch.randn(batch, 1, 1, 1), torch.randn(1, 9), 3),
        "masked_conv2d": (one, torch.randn(1, 1, 3, 3), None, torch.ones(batch, 1, 1, 1), 1, 1),
        "inverted_residual": (one, *block, None),
    }[name]


@pytest.mark.parametrize("batch", [0, 1])
@every_op
def test_least_sizes_run_in_the_runtime(name, batch, tmp_path):
    call = OpCall(OPS[name], with_defaults(OPS[name], small_args(name, batch)))
    tensors = [a for a in call.args if isinstance(a, Tensor)]
    y = lower_call(call.op.overload, call.args, tmp_path)(*tensors)
    assert y.shape == call.exact.shape == (batch, 1, 1, 1)
    assert (np.abs(y - call.exact) <= call.rounding).all()


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """Return a program of one op, and its inputs."""
    folder = tmp_path_factory.mktemp("sliced")
    inputs = torch.rand(1, 4, 6, 8), torch.randn(1, 36, 3, 4)
    call = torch.ops.edgedyn.sliced_depthwise2d, (*inputs, None, 3)
    return lower_calls(Calls(call), folder), inputs


def test_strided_arrays_are_put_in_order(sliced):
    path, (x, grid) = sliced
    run = load(path)
    y = run(x.numpy(), grid.numpy())[0]
    turned = np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not turned.flags.c_contiguous
    assert np.array_equal(run(turned, grid.numpy())[0], y)
    assert np.array_equal(run(x.numpy().repeat(2, axis=3)[..., ::2], grid.numpy())[0], y)


@pytest.mark.parametrize("form", ["transposed", "every second"])
def test_runtime_refuses_strided_tensors(form, sliced):
    path, (x, grid) = sliced
    strided = {
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": x.repeat_interleave(2, dim=3)[..., ::2],
    }[form]
    method = Runtime.get().load_program(path).load_method("forward")
    with pytest.raises(RuntimeError):
        method.execute([strided, grid])


@pytest.mark.parametrize(
    ("x", "grid"),
    [
        (np.zeros((1, 4, 6, 9), np.float32), np.zeros((1, 36, 3, 4), np.float32)),
        (np.zeros((1, 4, 6, 8), np.float32), np.zeros((1, 36, 4, 4), np.float32)),
        (np.zeros((2, 4, 6, 8), np.float32), np.zeros((2, 36, 3, 4), np.float32)),
        (np.zeros((4, 6, 8), np.float32), np.zeros((1, 36, 3, 4), np.float32)),
        (np.zeros((1, 4, 6, 8), np.float64), np.zeros((1, 36, 3, 4), np.float32)),
        (np.zeros((1, 4, 6, 8), np.int8), np.zeros((1, 36, 3, 4), np.float32)),
        (np.zeros((1, 4, 6, 8), np.float32), np.zeros((1, 36, 3, 4), np.float16)),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_shapes_and_types_than_the_program_s_are_refused(x, grid, sliced):
    with pytest.raises(BundleError, match=r"ExecuTorch cannot run .* Expected the shapes"):
        load(sliced[0])(x, grid)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@every_op
def test_program_of_another_type_is_refused_by_the_kernel_when_it_is_lowered(name, dtype, tmp_path):
    args = tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in GOOD[name])
    with pytest.raises(ModelError, match=rf"ExecuTorch .* refuses .*{name}: expected x as a contiguous"):
        lower_call(OPS[name].overload, args, tmp_path)
