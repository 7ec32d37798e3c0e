"""A session of a small bundle whose program is a blur with a known radius, for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from small_bundles import make_manifest

from edgedyn.bundle.bundle import Bundle, write_bundle
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.device.session import Session
from edgedyn.files import staging_folder

RADIUS = 2
TILE = (16, 24)
OVERLAP = 4 * RADIUS
# Distinct taps, no symmetry: a transposed or shifted tile shows.
KERNEL = np.random.default_rng(3).uniform(0.01, 0.07, (5, 5)).astype(np.float32)
# k * eps * sum|terms|: 25 products and sums, then 4 weighted tiles, of values up to sum(KERNEL) <= 1.75.
ATOL = (25 + 8) * np.finfo(np.float32).eps * 1.75


def blur(channels, height, width, dtype="float32"):
    """Return a depthwise 5 x 5 convolution in ONNX, zero padding, channel c times (c + 1) / channels."""
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    scale = np.arange(1, channels + 1, dtype=np.float32)[:, None, None, None] / channels
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[RADIUS] * 4, group=channels)
    shape = [1, channels, height, width]
    values = [helper.make_tensor_value_info(name, element, shape) for name in "xy"]
    weights = numpy_helper.from_array((KERNEL * scale).astype(dtype), "w")
    graph = helper.make_graph([node], "blur", values[:1], values[1:], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def load(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = model if isinstance(model, str) else model.SerializeToString()
    program = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda *arrays: program.run(None, {"x": arrays[0]})


def tensor(name, shape, dtype="float32"):
    return TensorSpec(name, dtype, shape, "gray or R, G, B").to_json()


def write(out, *, channels=3, overlap=OVERLAP, dtype="float32", bias=0.0, **changes):
    """Write a whole bundle whose program is the blur and whose vector was computed by it, off by ``bias``."""
    shape = (1, channels, *TILE)
    model = blur(*shape[1:], dtype)
    x = np.random.default_rng(4).random(shape).astype(dtype)
    inputs, outputs = ([tensor(name, shape, dtype)] for name in "xy")
    manifest = make_manifest("blur", inputs, outputs, overlap)
    with staging_folder(out) as staging:
        (staging / "vectors").mkdir()
        onnx.save(model, staging / "model.onnx")
        np.save(staging / "vectors" / "0.input.npy", x)
        np.save(staging / "vectors" / "0.output.npy", load(model)(x)[0] + np.asarray(bias, dtype))
        return write_bundle(out, staging, {**manifest, **changes})


def session_of(bundle: Bundle) -> Session:
    return Session(bundle, load(str(bundle.path / "model.onnx")))


def picture(height, width, channels=3, seed=5):
    return np.random.default_rng(seed).random((height, width, channels)).astype(np.float32)
