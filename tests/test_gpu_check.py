"""What the check on a GPU counts and decides; what it measures needs one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import kernel_check
import pytest
import torch

TOOL = Path(gpu_check.__file__)


def test_machine_without_a_gpu_is_told_what_is_missing_with_exit_code_3(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "result.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 3
    assert "finds no NVIDIA GPU; expected a GPU, its driver and a torch with CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_check_needs_only_torch():
    code = (
        "import sys; names = 'executorch torchao nncf onnx onnxruntime typer rich pydantic yaml'.split();"
        "sys.modules.update(dict.fromkeys(names)); import gpu_check; print(len(gpu_check.OPS))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TOOL.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4"]


@pytest.mark.parametrize(
    ("times", "is_right", "passed"),
    [
        ({"times_eager": 10.0, "times_compiled": 1.0}, True, True),
        ({"times_eager": 9.9, "times_compiled": 5.0}, True, False),
        ({"times_eager": 50.0, "times_compiled": 0.9}, True, False),
        ({"times_eager": 50.0, "times_compiled": None}, True, False),
        ({"times_eager": 50.0, "times_compiled": 5.0}, False, False),
    ],
)
def test_row_passes_where_every_limit_is_met(times, is_right, passed):
    row = gpu_check.make_row("a", "float32", 2.0, 800, 500.0, times, is_right)
    assert row["share_of_copy"] == 0.8
    assert row["passed"] is passed
    assert gpu_check.make_row("a", "float32", 2.0, 799, 500.0, times, is_right)["passed"] is False


@pytest.mark.parametrize(("side", "used"), [(1, 1), (3, 4)])
def test_under_a_mask_only_what_active_positions_read_counts(side, used):
    op = gpu_check.OPS["masked_conv2d"]
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., 0, 0] = 1  # in a corner: 2 x 2 pixels of a 3 x 3 kernel exist
    args = torch.ones(1, 5, 4, 6), torch.ones(7, 5, side, side), None, mask, 1, side // 2
    case = kernel_check.make_case(op, args, "float16")
    y = torch.zeros(1, 7, 4, 6, dtype=torch.float16)
    assert gpu_check.minimal_bytes(op, case, y) == 2 * (used * 5 + 35 * side**2 + 24 + 7 * 24)


def test_batch_repeats_what_belongs_to_an_image():
    op = gpu_check.OPS["atom_depthwise2d"]
    case = kernel_check.make_case(op, next(iter(op.examples())), "float32")
    more = gpu_check.batch_up(op, case, 3)
    assert [len(t) for t in more.inputs] == [6, 6, len(case.inputs[2])]
    assert torch.equal(more.inputs[1][2:4], case.inputs[1])


@pytest.mark.parametrize("name", gpu_check.OPS)
def test_stock_form_gives_what_the_kernel_has_to_give(name):
    op = gpu_check.OPS[name]
    for dtype in ("float32", "int8"):
        case = kernel_check.make_case(op, next(iter(op.examples())), dtype)
        y = gpu_check.stock(op, case)(*case.inputs)
        assert ((y - case.exact).abs() <= case.limit).all()


def test_workloads_fit_their_ops_and_are_larger_than_a_cache():
    for load in gpu_check.workloads():
        op = gpu_check.OPS[load.op]
        args = load.make()
        y = op.overload(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        assert load.images * (args[0].nbytes + y.nbytes) > 400e6, load.name  # an H200 has 50 MB
