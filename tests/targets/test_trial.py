"""Programs that lowering runs before it ships them: a runtime that ends its process ends that one alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from small_bundles import SHAPE, onnx_model

from edgedyn.errors import ModelError
from edgedyn.targets import trial
from edgedyn.targets.executorch.trial import refuse_failing
from edgedyn.targets.onnxruntime import lower
from edgedyn.targets.trial import end_kept, find_refusal

X = np.ones(SHAPE, np.float32)


class Double(torch.nn.Module):
    def forward(self, x):
        return x + x


@pytest.fixture(scope="module")
def program():
    return torch.export.export(Double().eval(), (torch.from_numpy(X),))


@pytest.fixture
def dying_pte(program, tmp_path: Path) -> Path:
    """Return an ExecuTorch program with a damaged byte, on which executorch 1.5.1 aborts."""
    from executorch.exir import to_edge_transform_and_lower

    data = bytearray(to_edge_transform_and_lower(program).to_executorch().buffer)
    rng = np.random.default_rng(21)
    for _ in range(int(rng.integers(1, 4))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    (tmp_path / "model.pte").write_bytes(data)
    return tmp_path / "model.pte"


def edges(program):
    from executorch.exir import to_edge

    return lambda: to_edge({"forward": program})


def test_a_program_that_aborts_the_runtime_is_refused_with_its_lines(dying_pte: Path, program):
    with pytest.raises(ModelError) as caught:
        refuse_failing(dying_pte, "forward", program, edges(program))
    message = str(caught.value)
    assert "refuses program 'forward': [method.cpp" in message
    assert "assert failed (i < n_value_)" in message
    assert "the process that ran it was ended by SIGABRT. Write these layers with other operators" in message
    assert not dying_pte.exists()


def test_the_process_is_kept_for_the_next_program_and_replaced_after_a_refusal(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(onnx_model())
    (tmp_path / "b.onnx").write_bytes(onnx_model()[:-1])
    end_kept()
    assert find_refusal("onnxruntime", tmp_path / "a.onnx", "forward", [X]) is None
    (child,) = trial._kept.values()
    assert find_refusal("onnxruntime", tmp_path / "a.onnx", "forward", [X]) is None
    assert list(trial._kept.values()) == [child]
    refusal = find_refusal("onnxruntime", tmp_path / "b.onnx", "forward", [X])
    assert refusal is not None
    assert "cannot be read as ONNX" in refusal.words
    assert (refusal.has_ended, trial._kept) == (False, {})
    assert child._process.returncode is not None


def test_a_process_that_is_killed_between_two_programs_is_a_refusal_that_says_so(tmp_path: Path, program):
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    assert find_refusal("onnxruntime", tmp_path / "model.onnx", "forward", [X]) is None
    (child,) = trial._kept.values()
    child._process.kill()
    child._process.wait()
    with pytest.raises(ModelError, match=r"the process that ran it was ended by SIGKILL\. Keep layers"):
        lower.refuse_failing(tmp_path / "model.onnx", program)


def test_a_program_that_asks_for_more_memory_than_there_is_is_refused(tmp_path: Path, program):
    large = numpy_helper.from_array(np.array([1 << 40], np.int64), "large")
    node = [helper.make_node("ConstantOfShape", ["large"], ["z"])]
    node += [helper.make_node("ReduceMax", ["z"], ["m"]), helper.make_node("Add", ["x", "m"], ["y"])]
    (tmp_path / "model.onnx").write_bytes(onnx_model(*node, initializers=[large]))
    with pytest.raises(ModelError, match=r"(?i)alloc"):
        lower.refuse_failing(tmp_path / "model.onnx", program)


def test_the_process_ends_with_its_parent(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    np.save(tmp_path / "x.npy", X)
    code = f"""
import os, signal
from pathlib import Path
import numpy as np
from edgedyn.targets import trial
assert trial.find_refusal("onnxruntime", Path({str(tmp_path / "model.onnx")!r}), "forward",
                          [np.load({str(tmp_path / "x.npy")!r})]) is None
(child,) = trial._kept.values()
print(child._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    assert done.returncode == -9
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the process is still there")
