"""ONNX programs are loaded and run once before they are shipped; a refusal quotes ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_networks import make_program

from edgedyn import targets
from edgedyn.errors import ModelError
from edgedyn.targets.onnxruntime import lower
from edgedyn.targets.trial import Refusal

BOTH = pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])


@BOTH
@pytest.mark.parametrize(
    "line", ["Non-zero status code returned while running Conv node. Name:'node_conv2d_1', no add or conv2d"]
)
def test_program_that_fails_is_removed_and_its_layer_named(name, line, tmp_path: Path, monkeypatch):
    # no program of ours makes ONNX Runtime say this; the trial itself is in test_trial.py
    monkeypatch.setattr(lower, "find_refusal", lambda *_: Refusal(line, (), has_ended=False))
    program, _ = make_program("int8")
    with pytest.raises(ModelError) as caught:
        targets.load(name).lower({"forward": program}, tmp_path, "int8")
    assert line in str(caught.value)
    assert "quantize.keep_float: [body]" in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


@BOTH
def test_file_that_cannot_be_loaded_is_refused(name, tmp_path: Path, monkeypatch):
    written = lower.write_models

    def write_damaged(programs, out, precision):
        models = written(programs, out, precision)
        (out / "model.onnx").write_bytes(b"damaged")
        return models

    for module in (lower, __import__("edgedyn.targets.tensorrt.lower", fromlist=["lower"])):
        monkeypatch.setattr(module, "write_models", write_damaged)
    program, _ = make_program("int8")
    with pytest.raises(ModelError, match="Protobuf parsing failed"):
        targets.load(name).lower({"forward": program}, tmp_path, "int8")
