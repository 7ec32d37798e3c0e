"""Layers whose weight is computed from data, and their exact form where it is a linear mix of constants.

    W(x) = sum_k a_k(x) W_k + W_0        layer(x, W(x)) = sum_k a_k(x) layer(x, W_k) + layer(x, W_0)

CondConv, dynamic convolution and their like mix kernels per image, in as many spellings as there are authors.
So the mix is found by the mathematics of the graph, not by its spelling: back from the weight through
operators that are affine in the data, to the few numbers a_k that they mix; W_k is the weight at a unit
vector.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from edgedyn.graph.constants import (
    add_constant,
    changed_in_place,
    frozen,
    memory_of,
    work_on_copy,
    works_on_its_own,
)
from edgedyn.graph.nodes import COUNTED_OPS, TRANSPOSED, argument, attribute, by_output, shape_of, sources

# K convolutions write K feature maps; CondConv has 8 kernels, dynamic convolution 4
MOST_KERNELS = 16

_ATEN = torch.ops.aten
_VIEWS = {
    "_unsafe_view", "clone", "constant_pad_nd", "contiguous", "expand", "expand_as", "flatten", "flip",
    "index_select", "mT", "movedim", "narrow", "numpy_T", "pad", "permute", "repeat", "repeat_interleave",
    "reshape", "roll", "select", "slice", "squeeze", "swapaxes", "swapdims", "t", "tile", "transpose",
    "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip
_LISTS = {"chunk", "split", "split_with_sizes", "unbind"}
_SUMS = {"add", "cat", "mean", "neg", "rsub", "stack", "sub", "sum"}
# affine in each argument alone
_PRODUCTS = {"bmm", "dot", "einsum", "inner", "matmul", "mm", "mul", "mv", "outer", "tensordot"}


def dynamic_layers(graph: fx.Graph, inputs: Collection[fx.Node]) -> list[fx.Node]:
    """Return the convolutions and linear layers whose weight depends on the program's inputs.

    Args:
        graph: of a captured program.
        inputs: the placeholders of its inputs, not those of its parameters.
    """
    data = depending(graph, inputs)
    return [node for node in graph.nodes if node.target in COUNTED_OPS and argument(node, 1) in data]


def mix_outputs(module: fx.GraphModule) -> bool:
    """Rewrite the layers of a program whose weight is a mix of at most ``MOST_KERNELS`` constants.

    A BatchNorm behind a layer with a weight from data, and a bias from data, join it first.

    Args:
        module: a captured program, constants folded; changed in place, and to be exported again.

    Returns:
        Whether the program was changed.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    layers = dynamic_layers(module.graph, inputs)
    for node in sources(argument(layer, 1) for layer in layers):
        work_on_copy(node)
    for layer in layers:
        _fold_norm(module, layer)
    data = depending(module.graph, inputs)
    biased = [n for n in module.graph.nodes if n.target in COUNTED_OPS and _bias(n) in data]
    for layer in biased:
        _add_behind(module, layer, _bias(layer))
        layer.update_arg(2, None)
    for layer in layers:  # its numbers may be computed from the outputs of mixes before it
        if numbers := find_mix(argument(layer, 1), depending(module.graph, inputs)):
            _mix(module, layer, numbers)
    module.graph.eliminate_dead_code()
    module.recompile()
    return bool(layers or biased)


def find_mix(weight: fx.Node, data: Collection[fx.Node]) -> list[fx.Node]:
    """Return the nodes that hold the numbers a_k of a weight; empty where it is no mix of few constants.

    A value that is changed through a view ends the search: the graph does not show what reads the change.

    Args:
        weight: node of a weight from data.
        data: all nodes that depend on the input.
    """
    order = {node: number for number, node in enumerate(weight.graph.nodes)}
    cut, fewest = {weight}, MOST_KERNELS + 1
    best: list[fx.Node] = []
    changed = changed_in_place(weight.graph)
    while affine := [node for node in cut if _is_affine(node, data)]:
        latest = max(affine, key=order.__getitem__)
        cut = (cut - {latest}) | {node for node in latest.all_input_nodes if node in data}
        if not changed.isdisjoint(map(memory_of, (latest, *cut))):
            break
        count = sum(_count(node) for node in cut)
        if count < fewest:
            best, fewest = sorted(cut, key=order.__getitem__), count
    return best


def depending(graph: fx.Graph, inputs: Collection[fx.Node]) -> set[fx.Node]:
    """Return the inputs and all nodes computed from them."""
    data = set(inputs)
    for node in graph.nodes:
        if not data.isdisjoint(node.all_input_nodes):
            data.add(node)
    return data


def _count(node: fx.Node) -> int:
    """Return the number of values of a node; more than any mix has for one that is no float tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return MOST_KERNELS + 1
    return math.prod(value.shape)


def _is_affine(node: fx.Node, data: Collection[fx.Node]) -> bool:
    """Whether a node computes an affine function of the nodes from data among its inputs."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_function"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    name = target._schema.name.partition("::")[2]
    if target._schema.is_mutable and works_on_its_own(node):
        name = name.removesuffix("_")
    arguments: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), arguments.append)
    varying = [argument for argument in arguments if argument in data]  # w * w has two
    if name in _VIEWS | _LISTS | _SUMS:
        return node.kwargs.get("dtype") is None
    if name in ("div", "linear", "conv1d", "conv2d"):
        return varying == [node.args[0]] and "rounding_mode" not in node.kwargs
    if name in ("addmm", "baddbmm"):
        return not all(argument in data for argument in node.args[1:3])
    return name in _PRODUCTS and len(varying) == 1


def _mix(module: fx.GraphModule, layer: fx.Node, numbers: list[fx.Node]) -> None:
    """Replace a layer by static ones, one per number, and the sum of their outputs times these numbers."""
    x, weight, bias, rest = layer.args[0], argument(layer, 1), _bias(layer), layer.args[3:]
    kernels, constant = _kernels(module, weight, numbers)
    rank = len(layer.meta["val"].shape)
    y: fx.Node | None = None

    def add(term: fx.Node) -> None:
        nonlocal y
        y = term if y is None else _call(module, layer, _ATEN.add.Tensor, (y, term))

    def static(kernel: Tensor, number: int, bias: Any = None) -> fx.Node:
        name = f"{layer.name}_kernel_{number}"
        stored = add_constant(module, layer, name, frozen(kernel), {**layer.meta, "val": kernel})
        return _call(module, layer, layer.target, (x, stored, bias, *rest), layer.kwargs)

    for number, (source, index, kernel) in enumerate(kernels):
        shape = [1, _count(source), *[1] * (rank - 2)] if rank > 2 else [_count(source)]
        flat = _call(module, layer, _ATEN.reshape.default, (source, shape))
        axis = min(1, len(shape) - 1)
        one = _call(module, layer, _ATEN.slice.Tensor, (flat, axis, index, index + 1))
        add(_call(module, layer, _ATEN.mul.Tensor, (static(kernel, number), one)))
    if constant is not None:
        add(static(constant, len(kernels), bias))
    assert y is not None
    layer.replace_all_uses_with(y)
    if bias is not None and constant is None:
        _add_behind(module, y, bias, like=layer)


def _kernels(
    module: fx.GraphModule, weight: Any, numbers: list[fx.Node]
) -> tuple[list[tuple[fx.Node, int, Tensor]], Tensor | None]:
    """Return W_k with the node and index of a_k, and W_0, None where it adds nothing; computed in float64."""
    zeros = {node: torch.zeros(node.meta["val"].shape, dtype=torch.float64) for node in numbers}
    dtype = weight.meta["val"].dtype
    origin = _evaluate(module, weight, zeros)
    kernels = []
    for node in numbers:
        for index in range(_count(node)):
            unit = zeros[node].clone()
            unit.view(-1)[index] = 1
            kernel = _evaluate(module, weight, {**zeros, node: unit}) - origin
            if kernel.any():
                kernels.append((node, index, kernel.to(dtype)))
    return kernels, (origin.to(dtype) if origin.any() or not kernels else None)


def _evaluate(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Tensor:
    """Compute a node in float64 from the values of others and from constants."""
    values = dict(known)

    def visit(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = _double(attribute(module, node))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), visit)
                assert callable(node.target)
                values[node] = _double(node.target(*args, **kwargs))
        return values[node]

    with torch.no_grad():
        result: Tensor = visit(node)
    return result.contiguous()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _bias(layer: fx.Node) -> Any:
    return argument(layer, 2)


def _add_behind(module: fx.GraphModule, y: fx.Node, bias: Any, like: fx.Node | None = None) -> None:
    """Add a bias (O,) to an output in an operator of its own."""
    like = like or y
    with module.graph.inserting_after(y):
        total = module.graph.call_function(_ATEN.add.Tensor)
    total.meta = dict(like.meta)
    shaped = bias
    if positions := [1] * (len(shape_of(argument(like, 1))) - 2):  # axes behind the channels
        shaped = _call(module, total, _ATEN.reshape.default, (bias, [-1, *positions]), like=like)
    y.replace_all_uses_with(total)
    total.args = (y, shaped)


def _call(
    module: fx.GraphModule,
    before: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """Insert a call in front of a node, as a part of its layer."""
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args, kwargs)
    node.meta = dict((like or before).meta)
    return node


def _fold_norm(module: fx.GraphModule, layer: fx.Node) -> None:
    """Fold a BatchNorm behind a layer into the expressions of its weight and bias.

    The operator ``batch_norm`` is folded later into stored weights only.
    """
    norm = next(iter(layer.users), layer)
    if (
        len(layer.users) != 1
        or norm.target is not _ATEN.batch_norm.default
        or layer.target is _ATEN.linear.default
    ):
        return
    constants = [argument(norm, index) for index in range(1, 5)]
    if argument(norm, 5) or any(node is not None and node.op != "get_attr" for node in constants):
        return  # with statistics of the image, or a gain from data
    scale, shift, mean, variance = (None if x is None else attribute(module, x).detach() for x in constants)
    if mean is None or variance is None:
        return
    factor = (1 if scale is None else scale) / (variance + argument(norm, 7)).sqrt()
    offset = (0 if shift is None else shift) - mean * factor

    def times(value: Any, factor: Tensor, name: str) -> fx.Node:
        stored = add_constant(module, layer, f"{layer.name}_{name}", factor, {**layer.meta, "val": factor})
        product = _call(module, layer, _ATEN.mul.Tensor, (value, stored))
        product.meta["val"] = value.meta["val"]
        return product

    bias = _bias(layer)
    if isinstance(bias, fx.Node):
        bias = times(bias, factor, "bias_gain")
        stored = add_constant(module, layer, f"{layer.name}_offset", offset, {**layer.meta, "val": offset})
        bias = _call(module, layer, _ATEN.add.Tensor, (bias, stored))
        bias.meta["val"] = offset
    else:
        bias = add_constant(module, layer, f"{layer.name}_offset", offset, {**layer.meta, "val": offset})
    weight = times(argument(layer, 1), _per_output(layer, factor), "gain")
    layer.args = (layer.args[0], weight, bias, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)


def _per_output(layer: fx.Node, values: Tensor) -> Tensor:
    """Shape one value per output channel so that it multiplies the weight of a convolution."""
    shape = shape_of(argument(layer, 1))
    if layer.target not in TRANSPOSED:
        return by_output(values, torch.empty(shape, device="meta"))
    groups = len(values) // shape[1]  # weights are (I, O / groups, kernel)
    rows = values.view(groups, shape[1]).repeat_interleave(shape[0] // groups, 0)
    return rows.view(*shape[:2], *[1] * (len(shape) - 2))
