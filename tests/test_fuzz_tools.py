"""The fuzzer reports what it finds and goes on; the instruction counter counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import bench_ops
import drivers
import fuzz_ops
import numpy as np
import pytest
import typer
from drivers import DriverStoppedError, Job, Result
from random_calls import random_call

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
