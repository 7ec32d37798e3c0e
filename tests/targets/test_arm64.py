"""ARM64, emulated: our kernels give the same results with NEON as on x86, in the runner without Python.

Both run the same ``.pte`` on the same inputs. The emulator is 20 to 40 times slower, so one process runs all
calls of our ops.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_check import int8_bounds, int8_call, rounding
from lowered_calls import EXAMPLES, OPS, Calls, lower_calls
from torch import Tensor

from edgedyn.errors import BundleError, TargetMissingError
from edgedyn.targets.executorch import runner
from edgedyn.targets.executorch.run import load

pytestmark = [pytest.mark.arm64, pytest.mark.usefixtures("arm64")]


def larger() -> dict[str, tuple]:
    """Return calls that no scratch holds at once: several strips, blocks of channels, slices of depth."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def block(x: Tensor, hidden: int, mask: Tensor | None) -> tuple:
        expand, depthwise = rand(hidden, x.shape[1], 1, 1), rand(hidden, 1, 3, 3)
        project = rand(x.shape[1], hidden, 1, 1)
        tensors = (expand, rand(hidden), rand(hidden), depthwise, rand(hidden), None, project)
        return x, *tensors, rand(x.shape[1]), None, mask, "prelu", "relu6", "none", 1, True

    mask, wide = (rand(1, 1, 9, 14) > 0).float(), (rand(1, 1, 20, 150) > 0).float()
    cases = {
        "sliced_depthwise2d-wide": (rand(1, 3, 21, 300), rand(1, 27, 3, 9), rand(1, 3, 3, 9), 3),
        "decoupled_depthwise2d-wide": (rand(1, 40, 6, 500), rand(1, 360, 1, 1), rand(1, 9, 6, 500), 3),
        "atom_depthwise2d-wide": (rand(1, 5, 6, 150), rand(1, 7 * 3, 6, 150), rand(3, 9), 3),
        "masked_conv2d-deep": (rand(1, 24, 9, 14), rand(130, 24, 3, 3), rand(130), mask, 1, 1),
        "masked_conv2d-wide": (rand(1, 18, 20, 150), rand(18, 1, 3, 3), None, wide, 1, 1, 1, 18),
        "inverted_residual-wide": block(rand(1, 6, 20, 150), 40, None),
        "inverted_residual-deep": block(rand(1, 24, 9, 14), 320, mask),
    }
    calls = {name: (name.split("-")[0], args) for name, args in cases.items()}
    return {name: (OPS[op], args) for name, (op, args) in calls.items() if op in OPS}


CASES = EXAMPLES | larger()
every_case = pytest.mark.parametrize("name", CASES)


def on_both(calls: list[tuple], folder) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the outputs of calls on x86 and on ARM64."""
    made = Calls(*calls)
    path, arrays = lower_calls(made, folder), [tensor.numpy() for tensor in made.inputs()]
    return load(path)(*arrays), runner.load(path)(*arrays)


@pytest.fixture(scope="module")
def float_outputs(tmp_path_factory):
    calls = [(op.overload, args) for op, args in CASES.values()]
    return dict(zip(CASES, zip(*on_both(calls, tmp_path_factory.mktemp("float")), strict=True), strict=True))


@pytest.fixture(scope="module")
def int8_outputs(tmp_path_factory):
    calls = [int8_call(op, args) for op, args in CASES.values()]
    return dict(zip(CASES, zip(*on_both(calls, tmp_path_factory.mktemp("int8")), strict=True), strict=True))


@every_case
def test_float_kernel_computes_what_it_computes_on_x86(float_outputs, name):
    x86, arm64 = float_outputs[name]
    assert arm64.shape == x86.shape
    # each is within this of the exact sum (test_kernels); a sum may be in another order there
    assert (np.abs(arm64 - x86) <= 2 * rounding(*CASES[name]).numpy()).all()
    assert len(np.unique(x86)) > min(10, x86.size // 2)


@every_case
def test_int8_kernel_gives_the_bits_of_x86_or_a_float_within_its_bounds(int8_outputs, name):
    x86, arm64 = int8_outputs[name]
    assert arm64.dtype == x86.dtype
    if x86.dtype == np.int8:
        assert np.array_equal(arm64, x86)
    else:
        low, high = int8_bounds(CASES[name][0], int8_call(*CASES[name])[1])
        assert ((low.numpy() <= arm64) & (arm64 <= high.numpy())).all()
    assert len(np.unique(x86)) > min(10, x86.size // 2)


def test_special_values_arrive_where_they_do_on_x86(tmp_path):
    """One NaN or infinity in each tensor of a call of each op."""
    calls = []
    for op, args in [(op, next(iter(op.examples()))) for op in OPS.values()]:
        places = [k for k, a in enumerate(args) if isinstance(a, Tensor)]
        for place in places[:2]:  # x, and a generated kernel or a weight
            for value in (np.nan, np.inf):
                spoiled = [a.clone() if isinstance(a, Tensor) else a for a in args]
                spoiled[place].flatten()[spoiled[place].numel() // 3] = value
                calls.append((op.overload, tuple(spoiled)))
    for x86, arm64 in zip(*on_both(calls, tmp_path), strict=True):
        assert not np.isfinite(x86).all()
        assert np.array_equal(np.isfinite(arm64), np.isfinite(x86))
        assert np.array_equal(np.isnan(arm64), np.isnan(x86))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return a program of one input of 2 x 3 x 5 x 7 values, and that input."""
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    grid = torch.randn(2, 27, 2, 3, generator=torch.Generator().manual_seed(2))
    calls = Calls((OPS["sliced_depthwise2d"].overload, (x, grid, None, 3)))
    return lower_calls(calls, tmp_path_factory.mktemp("program")), (x.numpy(), grid.numpy())


def test_runner_of_this_machine_gives_the_bits_of_the_python_binding(program):
    path, inputs = program
    jobs = [runner.Job(path, "forward", inputs), runner.Job(path, "forward", tuple(-x for x in inputs))]
    results = runner.run_all(jobs, runner.HERE)
    for job, outputs in zip(jobs, results, strict=True):
        expected = load(path)(*job.inputs)
        assert len(outputs) == len(expected) == 1
        assert np.array_equal(outputs[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, grid: (x[:, :2], grid), r"'shape': \(2, 2, 5, 7\), }; expected .*\(2, 3, 5, 7\)"),
        (lambda x, grid: (x.astype(np.float64), grid), "'descr': '<f8'.*expected .*'<f4'"),
        (lambda x, grid: (x,), r"input_1.npy cannot be read; expected one .npy file an input"),
        (lambda x, grid: (x, grid, x), "more inputs than the 2 that forward takes"),
    ],
    ids=["shape", "type", "one-less", "one-more"],
)
def test_runner_refuses_inputs_that_the_program_does_not_take(program, change, message):
    path, inputs = program
    with pytest.raises(BundleError, match=message):
        runner.load(path)(*change(*inputs))


def test_runner_refuses_a_method_that_the_program_does_not_have(program):
    with pytest.raises(BundleError, match="no method backward"):
        runner.load(program[0], "backward")(*program[1])


def test_runner_refuses_a_file_that_is_no_program(tmp_path):
    (tmp_path / "model.pte").write_bytes(bytes(100))
    with pytest.raises(BundleError, match="is no program of this runtime"):
        runner.load(tmp_path / "model.pte")()


def test_without_an_emulator_the_error_names_the_packages(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    with pytest.raises(TargetMissingError, match=r"no qemu-aarch64-static\. .*apt-get install"):
        runner.build(runner.ARM64)


def test_package_that_cannot_be_fetched_is_said_in_the_words_of_pip(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TargetMissingError, match=r"ARM64 package .* cannot be downloaded: .*No matching"):
        runner.arm64_package()
    assert list(tmp_path.rglob("executorch*")) == []
