"""Hand-made ONNX files, and a Python without some packages to load them in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def save_model(path: Path, nodes: list[onnx.NodeProto], *, shape: tuple[int, ...] = (1, 2)) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "hand_made", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgedyn", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def run_with_blocked(packages: list[str], code: str) -> str:
    """Run code in a Python where importing the packages fails; return what it prints."""
    block = f"import sys\nfor name in {packages}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", block + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout
