"""Our references against outputs of the authors' own code (``golden/``, see its README)."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import golden_check
import pytest
import torch
from golden_malleconv import smoothing
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
FILES = sorted((HERE / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_output_of_the_authors_code_is_reproduced(path):
    results = golden_check.check_file(path)
    assert [r for r in results if not r[1] <= r[2]] == []
    dtypes = {name.rpartition(" ")[2] for name, _, _ in results}
    assert dtypes == {"torch.float64", "torch.float32"}


def test_every_rule_has_a_file():
    officials = [golden_check.read(path, torch.float32).official for path in FILES]
    rules, bounds = golden_check.rules()
    assert all(any(name.startswith(prefix) for name in officials) for prefix in rules)
    assert bounds.keys() <= rules.keys()


def run_check(folder):
    command = [sys.executable, str(HERE / "golden_check.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def copy_changed(path, folder, change, official=None):
    """Copy a golden file with a changed tensor, or metadata, under a name that says nothing."""
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["official"] = official or metadata["official"]
    save_file(tensors, folder / "some.safetensors", metadata)


def test_command_goes_by_metadata_not_by_file_name(tmp_path):
    shutil.copy(HERE / "golden/malle_op_k3_s4.safetensors", tmp_path / "x.safetensors")
    code, text = run_check(tmp_path)
    assert code == 0, text
    assert "ok      x.safetensors: 4 outputs" in text
    assert "1 of 1 files agree" in text


def test_command_fails_for_one_wrong_value(tmp_path):
    def disturb(tensors):
        y = tensors["output64.y"]
        y[0, 0, 0, 0] += 1e-9 * y.abs().max()

    copy_changed(HERE / "golden/malle_op_k3_s4.safetensors", tmp_path, disturb)
    code, text = run_check(tmp_path)
    assert code == 1
    assert "FAILED  some.safetensors" in text
    assert "0 of 1 files agree" in text


def test_command_fails_for_an_unknown_class(tmp_path):
    copy_changed(HERE / "golden/malle_op_k3_s4.safetensors", tmp_path, lambda t: None, official="who.knows")
    code, text = run_check(tmp_path)
    assert code == 1
    assert "no rule for 'who.knows'" in text


def test_command_fails_for_an_empty_folder(tmp_path):
    code, text = run_check(tmp_path)
    assert code == 1
    assert "holds no .safetensors file" in text


def test_smoothing_bound_holds_and_is_reached():
    """The bound itself, on a fine scan of the distances: not exceeded, and not generous."""
    distance = torch.linspace(0, 1, 100001, dtype=torch.float64)
    root = (distance**2 + 1e-8).sqrt()
    lost = (root - distance) + (((1 - distance) ** 2 + 1e-8).sqrt() - (1 - distance))
    assert 0.99 * smoothing(depth=8) < lost.max().item() <= smoothing(depth=8)
    assert math.isclose((root - distance).max().item(), smoothing(depth=1), rel_tol=1e-12)
