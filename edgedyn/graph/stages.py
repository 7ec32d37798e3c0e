"""One convolution of an inverted-residual block, with its activation and mask: read and check it.

    expand 1 x 1 -> depthwise 3 x 3 or 5 x 5 -> project 1 x 1, each: conv -> [activation ->] [mul mask]

``blocks.py`` finds whole blocks. A check that fails raises ``DiffersError`` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from edgedyn.graph.nodes import (
    argument,
    constant_of,
    convolution_arguments,
    has_stored_weight,
    module_path,
    shape_of,
    with_defaults,
)
from edgedyn.graph.values import is_binary

_PAIR = torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = _PAIR.quantize_per_tensor.default, _PAIR.dequantize_per_tensor.default
_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default}
_SIDES = (3, 5)
_SLOPED = "prelu"
_ACTIVATIONS = {"hardswish": "hardswish", "leaky_relu": _SLOPED, "relu": "relu", "relu6": "relu6"}
ACTIVATIONS_TAKEN = "none, ReLU, ReLU6, PReLU, LeakyReLU or hardswish"
_INT8 = (-128, 127, torch.int8)


@dataclass(frozen=True)
class Stage:
    """One convolution of a block, with its activation and its mask.

    Attributes:
        conv: the call.
        activation: none, relu, relu6, prelu or hardswish; LeakyReLU is a prelu.
        function: the call of the activation, None where there is none.
        mask: the factor of 0 and 1 behind it, None where there is none.
        end: the last of these calls: its value is the stage's output.
        qparams: scale and zero point of the output, where it is INT8.
    """

    conv: fx.Node
    activation: str
    function: fx.Node | None
    mask: fx.Node | None
    end: fx.Node
    qparams: tuple[float, int] | None = None


class DiffersError(Exception):
    """The reason why convolutions make no block: a sentence without its full stop."""


def read_stage(module: fx.GraphModule, conv: fx.Node) -> Stage:
    """Read activation and mask behind a convolution, as far as each has one reader."""
    end, function, activation, mask = conv, None, "none", None
    reader = only_reader(end)
    if reader is not None and (kind := _activation(reader)):
        end = function = reader
        activation = kind
    reader = only_reader(end)
    if reader is not None and operator_name(reader) == "mul":
        factor = other_term(reader, end)
        if factor is not None and _is_mask(module, factor, conv):
            end, mask = reader, factor
    return Stage(conv, activation, function, mask, end)


def slopes_of(module: fx.GraphModule, stage: Stage) -> Tensor | None:
    """Return the slope of each channel of a PReLU or LeakyReLU, (E,); None of any other activation."""
    if stage.activation != _SLOPED or stage.function is None:
        return None
    channels = len(stored_weight(module, stage.conv))
    if operator_name(stage.function) == "leaky_relu":
        (slope,) = with_defaults(stage.function.args[1:], 0.01)
        return torch.full((channels,), float(slope))
    return constant_of(module, stage.function.args[1]).flatten().expand(channels).clone()


def check_point(module: fx.GraphModule, conv: fx.Node) -> None:
    """Refuse a convolution that is no plain 1 x 1 one."""
    stride, padding, _, groups = convolution_arguments(conv)
    sides = tuple(stored_weight(module, conv).shape[2:])
    if sides != (1, 1) or groups != 1 or not is_all(stride, 1) or not is_all(padding, 0):
        raise DiffersError(
            f"{layer_name(conv)} has kernel {sides}, stride {stride}, padding {padding}, groups {groups}; "
            "expected a 1 x 1 convolution of stride 1 without padding and groups"
        )
    _check_bias(conv)


def check_depthwise(module: fx.GraphModule, conv: fx.Node, channels: int) -> None:
    """Refuse a convolution that the kernel's depthwise part does not compute."""
    stride, padding, dilation, groups = convolution_arguments(conv)
    outputs, _, *sides = stored_weight(module, conv).shape
    if groups != channels or outputs != channels:
        raise DiffersError(
            f"{layer_name(conv)} has {groups} groups and {outputs} output channels for {channels} input "
            "channels; expected one filter per channel"
        )
    side = sides[0]
    if side not in _SIDES or sides[1] != side:
        raise DiffersError(f"{layer_name(conv)} has kernel {tuple(sides)}; expected 3 x 3 or 5 x 5")
    if not (is_all(stride, 1) or is_all(stride, 2)) or not is_all(dilation, 1):
        raise DiffersError(
            f"{layer_name(conv)} has stride {stride} and dilation {dilation}; expected stride 1 or 2 and "
            "dilation 1"
        )
    if not is_all(padding, side // 2):
        raise DiffersError(f"{layer_name(conv)} has padding {padding}; expected {side // 2}")
    _check_bias(conv)


def _check_bias(conv: fx.Node) -> None:
    bias = argument(conv, 2)
    if bias is not None and bias.op != "get_attr":
        raise DiffersError(f"the bias of {layer_name(conv)} is computed; expected a stored one or none")


def check_masks(stages: tuple[Stage, Stage, Stage], side: int, stride: Any) -> None:
    """Refuse masks of the maps inside that do not follow from the mask of y."""
    hidden, filtered, mask = (stage.mask for stage in stages)
    inside = [m for m in (hidden, filtered) if m is not None]
    if inside and mask is None:
        raise DiffersError("a map inside is masked and its output is not: expected the mask behind it")
    if filtered is not None and filtered is not mask:
        raise DiffersError("the depthwise convolution's output and the block's output have different masks")
    if hidden is not None and not (is_all(stride, 1) and _reach(hidden, mask) >= side // 2):
        raise DiffersError(
            "the mask in front of the depthwise convolution is not the output's mask dilated: "
            f"max_pool2d(mask, {side}, stride=1, padding={side // 2})"
        )


def _reach(dilated: fx.Node, mask: fx.Node | None) -> int:
    """Return how many positions a mask is dilated by, -1 where it is not known to be a dilation."""
    if dilated is mask:
        return 0
    if operator_name(dilated) != "max_pool2d" or not isinstance(dilated.args[0], fx.Node):
        return -1
    kernel, stride, padding, dilation, ceil = with_defaults(dilated.args[1:], 1, None, (0,), (1,), False)
    side = kernel[0]
    plain = is_all(kernel, side) and side % 2 and is_all(stride or kernel, 1) and is_all(dilation, 1)
    inner = _reach(dilated.args[0], mask)
    return inner + side // 2 if plain and inner >= 0 and is_all(padding, side // 2) and not ceil else -1


def check_int8(module: fx.GraphModule, stages: tuple[Stage, Stage, Stage]) -> tuple[float, int] | None:
    """Return scale and zero point of x in INT8, None of a float block.

    Raises:
        DiffersError: for a block of both kinds.
    """
    kinds = [_int8_weight(module, stage.conv) for stage in stages]
    pairs = [stage.qparams is not None for stage in stages[:2]]
    if not any(kinds) and not any(pairs):
        return None
    x = stages[0].conv.args[0]
    qparams = qparams_of(x) if isinstance(x, fx.Node) and x.target is DEQUANTIZE else None
    if not all(kinds) or not all(pairs) or qparams is None:
        raise DiffersError(
            "only a part of it is INT8 with stored ranges: its three layers are INT8 together or not at all"
        )
    return qparams


def _int8_weight(module: fx.GraphModule, conv: fx.Node) -> bool:
    """Whether a convolution has an int8 weight with one scale per output channel and no zero points."""
    weight = argument(conv, 1)
    if weight.target is not _PAIR.dequantize_per_channel.default or weight.args[3] != 0:
        return False
    stored = constant_of(module, weight.args[0])
    return stored.dtype == torch.int8 and not constant_of(module, weight.args[2]).any()


def _activation(node: fx.Node) -> str | None:
    """Return the kind of an activation that the kernel computes, None of any other node."""
    name = operator_name(node)
    if name in ("clamp", "hardtanh", "clamp_min"):
        default = (-1, 1) if name == "hardtanh" else (None, None)
        low, high = with_defaults(node.args[1:], *default)
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        return {(0, 6): "relu6", (0, None): "relu"}.get((low, high)) if not _is_node(low, high) else None
    if name == "prelu":
        slopes = node.args[1]
        is_stored = isinstance(slopes, fx.Node) and slopes.op == "get_attr"
        return _SLOPED if is_stored else None
    return _ACTIVATIONS.get(name)


def _is_node(*values: object) -> bool:
    return any(isinstance(value, fx.Node) for value in values)


def _is_mask(module: fx.GraphModule, factor: fx.Node, conv: fx.Node) -> bool:
    """Whether a factor of a convolution's output is 0 or 1 at each position, for all channels alike."""
    batch, _, *size = shape_of(conv)
    return "val" in factor.meta and shape_of(factor) == (batch, 1, *size) and is_binary(module, factor)


def is_convolution(node: object) -> bool:
    """Whether a node is a convolution of (B, C, H, W) with a stored weight, not a transposed one."""
    if not isinstance(node, fx.Node) or node.target not in _CONVOLUTIONS or not has_stored_weight(node):
        return False
    is_transposed = node.target is torch.ops.aten.convolution.default and node.args[6]
    return not is_transposed and len(shape_of(node)) == 4


def is_point(module: fx.GraphModule, conv: fx.Node) -> bool:
    """Whether a convolution is a plain 1 x 1 one."""
    return tuple(stored_weight(module, conv).shape[2:]) == (1, 1) and convolution_arguments(conv)[3] == 1


def stored_weight(module: fx.GraphModule, conv: fx.Node) -> Tensor:
    """Return the stored weight of a convolution, int8 or float."""
    weight = argument(conv, 1)
    while weight.op != "get_attr":
        weight = weight.args[0]
    return constant_of(module, weight)


def qparams_of(node: fx.Node) -> tuple[float, int] | None:
    """Return scale and zero point of a Q or DQ node of int8 tensors, None of any other."""
    if node.target not in (QUANTIZE, DEQUANTIZE) or node.args[3:6] != _INT8:
        return None
    return node.args[1], node.args[2]  # type: ignore[return-value]


def operator_name(node: fx.Node) -> str:
    """Return the short name of a node's operator, in place or not."""
    return getattr(node.target, "_opname", "").removesuffix("_")


def only_reader(node: fx.Node) -> fx.Node | None:
    """Return the node that alone reads a value, None where there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_term(node: fx.Node, term: fx.Node) -> fx.Node | None:
    """Return the other argument of a sum or product of two nodes."""
    others = [x for x in node.args[:2] if x is not term]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def is_all(values: Any, expected: int) -> bool:
    """Whether one number, or each of several, is the expected one."""
    values = values if isinstance(values, list | tuple) else [values]
    return all(value == expected for value in values)


def layer_name(node: fx.Node) -> str:
    """Return the dotted path of a node's layer, else its own name."""
    return module_path(node) or node.name
