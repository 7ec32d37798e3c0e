"""Implicit INT8 of TensorRT up to 10, without Q/DQ nodes: a float ONNX and its calibration cache.

    QuantizeLinear -> DequantizeLinear of a value   removed; its scale is the value's line in the cache
    DequantizeLinear of an int8 weight              a float initializer, scale x quantized value

    TRT-100300-EntropyCalibration2                  first line of a cache: version and algorithm
    image: 3c010a14                                 name of a value, its scale as big-endian float32 in hex

A scale is TensorRT's dynamic range over 127 (NVIDIA, sampleINT8). Both files come from one Q/DQ model: every
name in the cache is a value of the float ONNX, whose weights are those of the calibration, equalized and
rounded by reconstruction.

TensorRT quantizes weights again; its scale is the largest weight of each channel over 127. Where our value of
that weight is 127, as after rounding to nearest, TensorRT's quantized values equal ours. Where reconstruction
left a smaller value, TensorRT's scale is finer than ours and undoes a part of reconstruction. TensorRT may
also run a layer of ``keep_float`` in INT8, if neighbouring layers gave scales to both its tensors: exclude
such layers with ``trtexec --layerPrecisions``. Q/DQ nodes have neither problem.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgedyn.targets.onnx_export import to_checked_proto

if TYPE_CHECKING:
    import onnx
    import onnx_ir

HEAD = "TRT-100300-EntropyCalibration2"  # TensorRT 10.3, of JetPack 6.1 and 6.2


def cache_text(scales: Mapping[str, float]) -> str:
    """Return a calibration cache.

    Args:
        scales: symmetric int8 scale of each value, by its name in the ONNX file.
    """
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()]
    return "\n".join([HEAD, *lines, ""])


def split_pairs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Split a Q/DQ model into a float model and the scales of its values.

    Args:
        model: symmetric INT8 by pairs of QuantizeLinear and DequantizeLinear; left as it is.

    Returns:
        The same graph in float, its weights dequantized, and the scale of each value that was quantized.

    Raises:
        ModelError: where ONNX's checker refuses the float model.
    """
    import onnx_ir

    float_model = onnx_ir.from_proto(model)
    graph = float_model.graph
    scales: dict[str, float] = {}
    for node in list(graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        x = node.inputs[0]
        if node.op_type == "QuantizeLinear":
            scales.setdefault(x.name, float(node.inputs[1].const_value.numpy()))
        elif x.is_initializer():
            x = _store_dequantized(graph, node)
        _bypass(graph, node, x)
    for constant in list(graph.initializers.values()):
        if not constant.uses():
            graph.initializers.pop(constant.name)
    return to_checked_proto(float_model), scales


def _bypass(graph: onnx_ir.Graph, node: onnx_ir.Node, source: onnx_ir.Value) -> None:
    """Remove a node; its consumers use ``source``, and an output of the graph keeps its name."""
    import onnx_ir

    (y,) = node.outputs
    if y.is_graph_output():
        kept = onnx_ir.Value(name=y.name, type=y.type, shape=y.shape)
        graph.append(onnx_ir.node("Identity", [source], outputs=[kept]))
        graph.outputs[graph.outputs.index(y)] = kept
    y.replace_all_uses_with(source)
    graph.remove(node, safe=True)


def _store_dequantized(graph: onnx_ir.Graph, node: onnx_ir.Node) -> onnx_ir.Value:
    """Store an int8 weight, one scale per channel, as float32 under the name of the node's output."""
    import onnx_ir

    quantized, scales = (value.const_value.numpy() for value in node.inputs[:2])
    axis = node.attributes["axis"].as_int()
    column = scales.reshape([-1 if k == axis else 1 for k in range(quantized.ndim)])
    name = node.outputs[0].name
    tensor = onnx_ir.tensor(quantized.astype(np.float32) * column, name=name)
    weight = onnx_ir.Value(name=name, type=node.outputs[0].type, shape=tensor.shape, const_value=tensor)
    graph.register_initializer(weight)
    return weight
