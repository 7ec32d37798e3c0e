"""Shifted zero points, for runtimes whose activations are symmetric: an offset on them, undone by a bias.

    x ~ s (q - z)            affine: behind a ReLU z = -128 uses all 256 values, z = 0 half of them
    x' = x + s z ~ s q       quantized in place of x, with zero point 0
    W x + b = W x' + (b - s z sum W)

Exact, down to the int8 values. Behind a convolution and its ReLU the offset is free: relu(y) + s z =
max(y + s z, s z), and y's bias takes it. Zero padding becomes padding by s z, in front of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from edgedyn.graph.constants import set_constant
from edgedyn.graph.nodes import (
    MULTIPLY_ADD_OPS,
    RELUS,
    bias_of,
    channel_axis,
    constant_of,
    convolution_arguments,
)

SHIFT = "shift"  # key in the meta of nodes that shift an activation, or pad a shifted one


def shift_zero_points(module: fx.GraphModule) -> None:
    """Turn every zero point of a Q/DQ program to 0.

    Args:
        module: a program whose INT8 inputs only convolutions and linear layers read, with per-channel int8
            weights; changed in place.
    """
    target = torch.ops.quantized_decomposed.quantize_per_tensor.default
    for node in [n for n in module.graph.nodes if n.target is target and n.args[2] != 0]:
        scale, zero_point, *rest = node.args[1:]
        offset = float(scale * zero_point)
        qparams = (scale, 0, *rest)
        node.args = (_shift(module, node, offset), *qparams)
        for dequantize in list(node.users):
            dequantize.args = (node, *qparams)
            for layer in list(dequantize.users):
                assert layer.target in MULTIPLY_ADD_OPS  # only these read INT8 on such a runtime
                bias = bias_of(module, layer)
                lost = -offset * _dequantized(module, layer).flatten(1).sum(1)
                set_constant(module, layer, 2, lost if bias is None else bias + lost)
                _pad(module, layer, offset, qparams)
    module.graph.eliminate_dead_code()
    module.recompile()


def _shift(module: fx.GraphModule, quantize: fx.Node, offset: float) -> fx.Node:
    """Return the input of a quantize node, shifted by an offset."""
    x = quantize.args[0]
    assert isinstance(x, fx.Node)
    layer = x.args[0] if x.target in RELUS else None
    is_free = isinstance(layer, fx.Node) and layer.target in MULTIPLY_ADD_OPS and len(layer.users) == 1
    if is_free and len(x.users) == 1:
        assert isinstance(layer, fx.Node)
        bias = bias_of(module, layer)
        y = layer.meta["val"]
        bias = torch.zeros(y.shape[channel_axis(y)]) if bias is None else bias
        set_constant(module, layer, 2, bias + offset)
        return _insert(module, quantize, torch.ops.aten.clamp.default, (layer, offset), x)
    return _insert(module, quantize, torch.ops.aten.add.Tensor, (x, offset), x)


def _pad(module: fx.GraphModule, layer: fx.Node, offset: float, qparams: tuple[Any, ...]) -> None:
    """Pad the input of a convolution by the offset, which stands for 0, in place of its own padding."""
    if layer.target is torch.ops.aten.linear.default:
        return
    stride, padding, dilation, groups = convolution_arguments(layer)
    if not any(padding):
        return
    x = layer.args[0]
    assert isinstance(x, fx.Node)
    sides = [side for size in reversed(list(padding) * (2 // len(padding))) for side in (size, size)]
    padded = _insert(module, layer, torch.ops.aten.constant_pad_nd.default, (x, sides, offset), x)
    pair = torch.ops.quantized_decomposed
    quantized = _insert(module, layer, pair.quantize_per_tensor.default, (padded, *qparams), x)
    dequantized = _insert(module, layer, pair.dequantize_per_tensor.default, (quantized, *qparams), x)
    rest = (stride, [0] * len(padding), dilation)
    is_general = layer.target is torch.ops.aten.convolution.default
    layer.args = (dequantized, *layer.args[1:3], *rest, *(layer.args[6:] if is_general else (groups,)))


def _insert(
    module: fx.GraphModule, before: fx.Node, target: Any, arguments: tuple[Any, ...], like: fx.Node
) -> fx.Node:
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, arguments)
    node.meta = {**like.meta, SHIFT: True}
    return node


def _dequantized(module: fx.GraphModule, layer: fx.Node) -> Tensor:
    """Return the dequantized weight of a layer."""
    dequantize = layer.args[1]
    assert isinstance(dequantize, fx.Node)
    quantized, scales, zeros = (constant_of(module, node) for node in dequantize.args[:3])
    pair = torch.ops.quantized_decomposed
    return pair.dequantize_per_channel(quantized, scales, zeros, *dequantize.args[3:])  # type: ignore[no-any-return]
