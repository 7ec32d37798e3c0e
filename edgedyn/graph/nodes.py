"""Read one node of an exported graph: its layer, shapes, constants and cost.

A node of a captured program (``torch.export``, before or after BatchNorm is folded) calls one operator of
torch. ``module_path`` and ``multiply_adds`` also read the graphs that ExecuTorch makes of such a program.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

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
TRANSPOSED = {
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
}
# also the convolutions that no target runs in INT8
COUNTED_OPS = (
    MULTIPLY_ADD_OPS
    | TRANSPOSED
    | {
        torch.ops.aten.conv1d.default,
        torch.ops.aten.conv1d.padding,
        torch.ops.aten.conv2d.padding,
        torch.ops.aten.conv3d.default,
        torch.ops.aten.conv3d.padding,
    }
)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the innermost module that a node was traced from, or the empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values()) if path), "")


def number_repeats(names: Iterable[str]) -> list[str]:
    """Make names unique: the second ``body`` becomes ``body#2``, the third ``body#3``."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return numbered


def belongs_to(node: fx.Node, classes: Collection[str]) -> bool:
    """Whether a node was traced from inside a module of one of the classes, ``package.module.Class``."""
    stack = node.meta.get("nn_module_stack") or {}
    return any(kind in classes or getattr(kind, "__qualname__", "") in classes for _, kind in stack.values())


def fused_activation(node: fx.Node) -> fx.Node | None:
    """Return the ReLU or clamp that is a layer's only consumer: runtimes fuse it into the layer.

    The layer's output is quantized behind it: in front of it, half of the 8-bit range would go to values that
    the ReLU sets to zero.
    """
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.target in FUSED_ACTIVATIONS else None


def is_int8(node: fx.Node) -> bool:
    """Whether input and weight of a convolution or linear layer are dequantized values."""
    return all(isinstance(x, fx.Node) and "dequantize" in str(x.target) for x in node.args[:2])


def has_stored_weight(node: fx.Node) -> bool:
    """Whether a convolution or linear layer of a module has a constant as its weight, dequantized or not."""
    weight = argument(node, 1)
    while isinstance(weight, fx.Node) and "dequantize" in str(weight.target):
        weight = argument(weight, 0)
    return isinstance(weight, fx.Node) and weight.op == "get_attr"  # a placeholder is an input


def is_quantizable(node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer that can be INT8: runtimes need a stored weight."""
    return node.target in MULTIPLY_ADD_OPS and has_stored_weight(node)


def multiply_adds(node: fx.Node) -> int:
    """Count the multiply-adds of a convolution, linear layer or matrix product from its shapes."""
    name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
    size = math.prod(shape_of(node))
    if name in ("mm", "addmm"):
        return size * shape_of(node.args[-1])[0]
    if name.startswith("conv_transpose") or (name == "convolution" and node.args[6]):
        size = math.prod(shape_of(node.args[0]))  # a transposed one applies a whole kernel per input value
    return size * math.prod(weight_shape(node)[1:])


def all_multiply_adds(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the multiply-adds of every convolution and linear layer of a captured program."""
    return {node: multiply_adds(node) for node in graph.nodes if node.target in COUNTED_OPS}


def convolution_arguments(node: fx.Node) -> tuple[Any, Any, Any, int]:
    """Return stride, padding, dilation and groups of a convolution's call."""
    if node.target is torch.ops.aten.convolution.default:
        stride, padding, dilation, _, _, groups = node.args[3:9]
        return stride, padding, dilation, int(groups)  # type: ignore[arg-type]
    stride, padding, dilation, groups = with_defaults(node.args[3:], (1, 1), (0, 0), (1, 1), 1)
    return stride, padding, dilation, int(groups)


def argument(node: fx.Node, index: int) -> Any:
    """Return a positional argument of a call, None where the call leaves it out."""
    return node.args[index] if len(node.args) > index else None


def sources(values: Iterable[Any]) -> set[fx.Node]:
    """Return the nodes that values depend on, themselves included."""
    nodes: set[fx.Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node not in nodes:
            nodes.add(node)
            waiting += node.all_input_nodes
    return nodes


def with_defaults(arguments: Iterable[Any], *defaults: Any) -> list[Any]:
    """Return positional arguments, completed by the defaults of those that a call leaves out."""
    passed = list(arguments)
    return [*passed, *defaults[len(passed) :]]


def shape_of(node: object) -> tuple[int, ...]:
    """Return the shape of a node's value."""
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a layer's weight: of a convolution (O, I / groups, kernel)."""
    return shape_of(node.args[1])


def channel_axis(value: Tensor) -> int:
    """Return the axis of channels: of a feature map (B, C, H, W), or of a linear layer's output (..., C)."""
    return 1 if value.dim() == 4 else value.dim() - 1


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """Return the value of a ``get_attr`` node: a constant, or a module that is called."""
    return operator.attrgetter(str(node.target))(module)


def constant_of(module: fx.GraphModule, node: object) -> Tensor:
    """Return the tensor of a ``get_attr`` node."""
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
    """Shape one value per output channel, (O,), so that it multiplies a weight (O, ...)."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def by_input(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value per input channel, (C,), so that it multiplies a weight (O, C / groups, ...)."""
    groups = len(values) // weight.shape[1]
    rows = values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
