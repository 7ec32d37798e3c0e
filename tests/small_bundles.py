"""Small bundles around a program that a test makes: whole and with right digests, whatever the program is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgedyn.bundle.bundle import Bundle, write_bundle
from edgedyn.bundle.manifest import FORMAT
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.files import staging_folder

SHAPE = (1, 3, 8, 12)


def tensor(name: str, shape: tuple[int, ...] = SHAPE) -> dict:
    return TensorSpec(name, "float32", shape, "R, G, B").to_json()


def onnx_model(*nodes, outputs=("y",), element=None, initializers=()) -> bytes:
    """Return an ONNX model of nodes from x to the outputs, by default the double of x."""
    from onnx import TensorProto, helper

    nodes = nodes or (helper.make_node("Add", ["x", "x"], ["y"]),)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)]
    values += [helper.make_tensor_value_info(name, element or TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], list(initializers))
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def make_manifest(
    name: str, inputs: list[dict], outputs: list[dict], overlap: int, file: str = "model.onnx"
) -> dict:
    """Return the manifest of a bundle of one program and one vector; the file's ending gives the target."""
    return {
        "format": FORMAT,
        "ok": True,
        "name": name,
        "edgedyn": "0.1.0",
        "target": "executorch" if file.endswith(".pte") else "onnxruntime",
        "precision": "fp32",
        "programs": {"forward": file},
        **{key: {} for key in ("routing", "forms", "versions", "digests", "facts")},
        "inputs": inputs,
        "outputs": outputs,
        "tile": {"overlap": overlap},
        "vectors": [
            {
                "inputs": ["vectors/0.input.npy"],
                "outputs": ["vectors/0.output.npy"],
                "max_abs": [1e-6],
                "rms": [1e-7],
            }
        ],
    }


def write_small(out: Path, program: bytes, file: str = "model.onnx", vector: bytes | None = None) -> Bundle:
    """Write a bundle of a program that doubles x, with one vector.

    Args:
        out: the directory.
        program: the content of the file.
        file: its name; the ending gives the target.
        vector: the content of the vector's input in place of a right one.
    """
    x = np.random.default_rng(0).random(SHAPE, np.float32)
    arrays = {"vectors/0.input.npy": x, "vectors/0.output.npy": x * 2}
    manifest = make_manifest("small", [tensor("x")], [tensor("y")], 2, file)
    with staging_folder(out) as staging:
        (staging / "vectors").mkdir()
        (staging / file).write_bytes(program)
        (staging / "recipe.yaml").write_text("model: {network: 'os:system'}\n")
        for name, array in arrays.items():
            np.save(staging / name, array)
        if vector is not None:
            (staging / "vectors/0.input.npy").write_bytes(vector)
        return write_bundle(out, staging, manifest)
