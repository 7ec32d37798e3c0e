"""What the nodes of a folded program are: convolutions, the activations fused into them, their layers."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from edgedyn.graph.rewrites import attribute

MULTIPLY_ADD_OPS = {
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.convolution.default,
}
RELUS = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default}
FUSED_ACTIVATIONS = RELUS | {
    torch.ops.aten.relu6.default,
    torch.ops.aten.relu6_.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
}
# those, and the convolutions that no target has in INT8
COUNTED_OPS = MULTIPLY_ADD_OPS | {torch.ops.aten.conv2d.padding, torch.ops.aten.conv_transpose2d.input}


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node was traced from, or the empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def belongs_to(node: fx.Node, classes: Collection[str]) -> bool:
    """Whether a node was traced from inside a module of one of the classes, ``package.module.Class``."""
    stack = node.meta.get("nn_module_stack") or {}
    return any(kind in classes or getattr(kind, "__qualname__", "") in classes for _, kind in stack.values())


def fused_activation(node: fx.Node) -> fx.Node | None:
    """Return the ReLU or clamp that a runtime computes with the convolution: its only reader.

    Quantized in front of it, half of the 8-bit range would hold values that it sets to zero.
    """
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.target in FUSED_ACTIVATIONS else None


def is_int8(node: fx.Node) -> bool:
    """Whether a convolution or linear layer reads dequantized values and weights only."""
    return all(isinstance(x, fx.Node) and "dequantize" in str(x.target) for x in node.args[:2])


def multiply_adds(node: fx.Node) -> int:
    """Count the multiply-adds of a convolution or linear node from its shapes."""
    shape, out = weight_shape(node), shape_of(node)
    if node.target is torch.ops.aten.conv_transpose2d.input:
        out = shape_of(node.args[0])  # each input value meets a whole kernel
    if node.target is torch.ops.aten.linear.default:
        return math.prod(shape) * math.prod(out[:-1])
    return math.prod(shape[1:]) * math.prod(out)


def shape_of(node: object) -> tuple[int, ...]:
    """Return the shape of what a node computes."""
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a layer's weight: of a convolution (O, I / groups, kernel)."""
    return shape_of(node.args[1])


def channel_axis(value: Tensor) -> int:
    """Return the axis of channels: of a map, or of what a linear layer writes."""
    return 1 if value.dim() == 4 else value.dim() - 1


def constant_of(module: fx.GraphModule, node: object) -> Tensor:
    """Return the tensor that a ``get_attr`` node reads."""
    assert isinstance(node, fx.Node)
    value: Tensor = attribute(module, node)
    return value.detach()


def weight_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """Return the weight of a convolution or linear layer."""
    return constant_of(module, node.args[1])


def bias_of(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Return the bias of a convolution or linear layer, or None where it has none."""
    argument = node.args[2] if len(node.args) > 2 else None
    return constant_of(module, argument) if isinstance(argument, fx.Node) else None


def by_output(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value an output channel, (O,), so that it multiplies a weight (O, ...)."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def by_input(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value an input channel, (C,), so that it multiplies a weight (O, C / groups, ...)."""
    groups = len(values) // weight.shape[1]
    rows = values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def set_constant(module: fx.GraphModule, node: fx.Node, index: int, value: Tensor) -> None:
    """Give a convolution or linear layer another weight (1) or bias (2), its first bias too.

    The old tensor is left to the program that the module was made of, which shares it.
    """
    old = node.args[index] if len(node.args) > index else None
    name = f"{node.name}_{'weight' if index == 1 else 'bias'}_calibrated"
    module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
    if isinstance(old, fx.Node) and old.target == name:
        return
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta = {**(old.meta if isinstance(old, fx.Node) else {}), "val": value.detach()}
    node.args = (*node.args[:index], constant, *node.args[index + 1 :])
    if isinstance(old, fx.Node) and not old.users:
        module.graph.erase_node(old)
        folder, _, leaf = str(old.target).rpartition(".")
        delattr(module.get_submodule(folder), leaf)
