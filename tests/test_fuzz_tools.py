"""The fuzzer reports what it finds and goes on; the instruction counter counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import bench_ops
import block_rows
import drivers
import fuzz_ops
import numpy as np
import pytest
import torch
import typer
from bench_rows import SqnrRow
from drivers import DriverStoppedError, Job, Result
from random_calls import random_call

from edgedyn.images.metrics import sqnr_db

OP = "atom_depthwise2d"


def test_call_that_ends_the_process_hides_no_other_failure():
    calls = [random_call(OP, 0, 2 * index) for index in range(6)]
    numbers = {id(call.args[0]): index for index, call in enumerate(calls)}
    wrong, deadly = 1, 3

    def run(jobs: Sequence[Job]) -> list[Result]:
        results = []
        for place, job in enumerate(jobs):
            index = numbers[id(job.values[0])]
            if index == deadly:
                raise DriverStoppedError(place, "heap-buffer-overflow")
            y = calls[index].exact.astype(np.float32)
            results.append(Result(y[..., :-1] if index == wrong else y, ""))
        return results

    found = fuzz_ops.failures(calls, run)
    assert sorted(index for index, _ in found) == [wrong, deadly]
    assert dict(found)[deadly] == "heap-buffer-overflow"


@pytest.mark.usefixtures("library")
def test_fuzz_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "fuzz.json"
    for rounds in (1, 2):
        with pytest.raises(SystemExit) as stopped:
            fuzz_ops.main(seconds=0, seed=5, op=OP, out=out)
        assert stopped.value.code == 0
        written = json.loads(out.read_text())
        assert written["calls"] == {OP: rounds * fuzz_ops.ROUND}
        assert written["failures"] == []
        assert written["runs"]["sanitizer address,undefined"] == rounds * fuzz_ops.ROUND
    with pytest.raises(typer.BadParameter, match="counts seed 5"):
        fuzz_ops.main(seconds=0, seed=6, op=OP, out=out)


def small_block(precision: str, kernels: str):
    network = block_rows.block("c")
    x, samples = block_rows.feature_map(32, (20, 28)), block_rows.calibration(32, (20, 28))
    return network, block_rows.lowered(network, x, samples, kernels, precision)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("precision", ["f32", "INT8"])
def test_a_row_of_blocks_calls_the_kernel_on_our_side_only(precision, tmp_path):
    op = {"f32": b"edgedyn::inverted_residual", "INT8": b"edgedyn::inverted_residual_int8"}[precision]
    for kernels, is_called in (("fused", True), ("stock", False)):
        network, make = small_block(precision, kernels)
        (tmp_path / kernels).mkdir()
        program = make(tmp_path / kernels)
        assert (op in program.path.read_bytes()) is is_called
        with torch.no_grad():
            (y,), expected = program.run(), network(*program.inputs)
        found = sqnr_db(y.numpy(), expected.numpy())
        # 8 bits of three maps, whose largest values are about four times their power's root
        assert found > 100 if precision == "f32" else 25 < found < 50


@pytest.mark.usefixtures("library")
def test_sqnr_is_of_both_programs_against_the_float_network():
    network, ours = small_block("INT8", "fused")
    exact = small_block("f32", "stock")[1]
    row = bench_ops.compare_sqnr(SqnrRow("fused INT8 - float", -0.5, network, ours, exact))
    assert row["db"] < 50 < row["yardstick_db"]
    assert row["difference"] == pytest.approx(row["db"] - row["yardstick_db"], abs=0.01)


def test_rows_of_masked_blocks_have_the_active_share_that_they_name():
    for active in block_rows.MASKED:
        field = block_rows.blobs(active, block_rows.KINDS["d"].size)
        assert float((field >= 0).float().mean()) == pytest.approx(active, abs=1e-3)


def test_every_row_has_a_name_of_its_own():
    names = [row.name for row in (*bench_ops.ROWS, *block_rows.SQNR_ROWS)]
    assert len(names) == len(set(names))


@pytest.mark.usefixtures("library")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
def test_instruction_counts_repeat(tmp_path):
    program = bench_ops.on_runtime(bench_ops.static(4, 32), "stock")(tmp_path)
    first, second = (drivers.count_instructions(program.path, program.inputs) for _ in range(2))
    assert second == pytest.approx(first, rel=1e-3)
    # 9 multiply-adds an output, 8 to an instruction of AVX2; the lowest and a generous highest cost of them
    assert 4 * 32 * 32 * 9 / 8 < first < 4 * 32 * 32 * 9 * 100


def test_without_valgrind_nothing_is_counted(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert drivers.count_instructions(Path("none.pte"), ()) is None
