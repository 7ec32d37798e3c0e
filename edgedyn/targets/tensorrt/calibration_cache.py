"""INT8 of TensorRT up to 10 without Q/DQ nodes: a float ONNX and the calibration cache that goes with it.

    QuantizeLinear -> DequantizeLinear of a value   gone; its scale is the value's line in the cache
    DequantizeLinear of an int8 weight              a float initializer, scale x code

    TRT-100300-EntropyCalibration2                  what a cache begins with: version and algorithm
    image: 3c010a14                                 a value's name, its scale as big-endian float32 in hex

A line is what TensorRT calls a dynamic range over 127 (NVIDIA, sampleINT8). Both files are made of one Q/DQ
model, so that every name in the cache is a value of the float ONNX, and its weights are those that the scales
were observed with: equalized, and rounded by reconstruction.

TensorRT rounds weights again, by the largest of each channel over 127. Where that is code 127, as rounding to
nearest makes it, it finds our codes; where reconstruction left less, its step is finer than ours and part of
what reconstruction won is lost. It may also take a layer of ``keep_float`` to INT8 where its neighbours gave
both its tensors a scale: name such layers to it (``trtexec --layerPrecisions``). Q/DQ has neither trouble.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

HEAD = "TRT-100300-EntropyCalibration2"  # TensorRT 10.3, of JetPack 6.1 and 6.2


def cache_text(scales: Mapping[str, float]) -> str:
    """Return a calibration cache.

    Args:
        scales: symmetric int8 step of each value, by its name in the ONNX file.
    """
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()]
    return "\n".join([HEAD, *lines, ""])


def split_pairs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Take a Q/DQ model apart into a float model and the scales of its values.

    Args:
        model: symmetric INT8 by pairs of QuantizeLinear and DequantizeLinear; left as it is.

    Returns:
        The same graph in float, its weights dequantized, and the scale of each value that was quantized.
    """
    import onnx
    from onnx.numpy_helper import from_array, to_array

    arrays = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    scales: dict[str, float] = {}
    same: dict[str, str] = {}  # a value of a pair -> the float value that it stands for
    nodes, weights = [], []
    for node in model.graph.node:
        given = [same.get(name, name) for name in node.input]
        if node.op_type == "QuantizeLinear":
            scales.setdefault(given[0], float(arrays[node.input[1]]))
            same[node.output[0]] = given[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            weights.append(from_array(_dequantize(node, arrays), node.output[0]))
        elif node.op_type == "DequantizeLinear":
            same[node.output[0]] = given[0]
        else:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            kept.input[:] = given
            nodes.append(kept)
    for name in (value.name for value in model.graph.output if value.name in same):
        nodes.append(onnx.helper.make_node("Identity", [same[name]], [name]))
    read = {name for node in nodes for name in node.input}
    weights += [tensor for tensor in model.graph.initializer if tensor.name in read]
    return _with_nodes(model, nodes, weights), scales


def _dequantize(node: onnx.NodeProto, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the float32 values of a weight of int8 codes with a scale a channel."""
    codes, scales = (arrays[name] for name in node.input[:2])
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    column = scales.reshape([-1 if k == axis else 1 for k in range(codes.ndim)])
    return np.asarray(codes.astype(np.float32) * column)


def _with_nodes(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], initializers: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    """Return a checked model of the same inputs and outputs; types of values between are left out."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    for field, values in (("node", nodes), ("initializer", initializers), ("value_info", ())):
        made.graph.ClearField(field)
        getattr(made.graph, field).extend(values)
    onnx.checker.check_model(made, full_check=True)
    return made
