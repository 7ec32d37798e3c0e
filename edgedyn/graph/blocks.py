"""Inverted-residual blocks of a folded program, found by their structure: one kernel of ours computes each.

    y = [x +] [mask *] act3(W3 . act2(DW(act1(W1 . x + b1)) + b2) + b3)

    float    conv 1x1 -> act -> [mul ->] depthwise -> act -> [mul ->] conv 1x1 -> act [-> mul mask] [-> add x]
    INT8     the same, with Q -> DQ in front of each convolution and dequantized weights

x: (B, C, H, W)   y: (B, O, h, w)   mask: (B, 1, h, w) of 0 and 1   depthwise: 3 x 3 or 5 x 5, stride 1 or 2

The masks of the two maps inside follow from that of y: no position matters that is farther from an active one
than the depthwise kernel reaches. A block is taken only where nothing outside of it reads a value inside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from edgedyn.graph.constants import is_in_place, memory_of
from edgedyn.graph.nodes import (
    FUSED_ACTIVATIONS,
    MULTIPLY_ADD_OPS,
    convolution_arguments,
    is_int8,
    module_path,
)
from edgedyn.graph.stages import (
    ACTIVATIONS_TAKEN,
    DEQUANTIZE,
    QUANTIZE,
    DiffersError,
    Stage,
    check_depthwise,
    check_int8,
    check_masks,
    check_point,
    is_all,
    is_convolution,
    is_point,
    layer_name,
    only_reader,
    operator_name,
    other_term,
    qparams_of,
    read_stage,
    stored_weight,
)


@dataclass(frozen=True)
class Block:
    """An inverted-residual block.

    Attributes:
        x: the value that it reads. In INT8 the float value in front of Q, where nothing else needs the
            rounded one; a sum adds x as it is.
        stages: expand, depthwise and project.
        mask: mask of y, None where there is none.
        is_residual: whether it adds x.
        output: the call that computes y.
        qparams: scale and zero point of x as the first convolution reads it, None where the block is float.
    """

    x: fx.Node
    stages: tuple[Stage, Stage, Stage]
    mask: fx.Node | None
    is_residual: bool
    output: fx.Node
    qparams: tuple[float, int] | None = None

    @property
    def path(self) -> str:
        """Dotted path that its three layers have in common."""
        paths = [module_path(stage.conv).split(".") for stage in self.stages]
        same = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
        return ".".join(same)

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """Its calls, without those that convert to INT8 and back."""
        calls = {node for s in self.stages for node in (s.conv, s.function, s.end) if node is not None}
        return frozenset({*calls, self.output})

    def __repr__(self) -> str:
        """Return one line: path, activations, mask and sum."""
        kinds = " ".join(stage.activation for stage in self.stages)
        extra = "".join(n for n, has in ((", masked", self.mask), (", residual", self.is_residual)) if has)
        return f"Block({self.path}: {kinds}{extra})"


@dataclass(frozen=True)
class Refusal:
    """A depthwise convolution in front of a 1 x 1 convolution that makes no block.

    Attributes:
        path: dotted path of the depthwise layer.
        reason: a sentence without its full stop.
    """

    path: str
    reason: str


def find_blocks(module: fx.GraphModule) -> tuple[tuple[Block, ...], tuple[Refusal, ...]]:
    """Return the blocks of a folded program in its order, and the reasons why others were not taken.

    No two blocks share a layer: of two that could, the earlier one is taken.

    Args:
        module: a folded program, with Q/DQ pairs or without; left as it is.
    """
    blocks: list[Block] = []
    refusals: list[Refusal] = []
    for node in module.graph.nodes:
        if not is_convolution(node) or convolution_arguments(node)[3] == 1 or not _meets_point(module, node):
            continue
        try:
            blocks.append(_match(module, node, {s.conv: b for b in blocks for s in b.stages}))
        except DiffersError as differs:
            refusals.append(Refusal(layer_name(node), str(differs)))
    return tuple(blocks), tuple(refusals)


def _match(module: fx.GraphModule, depthwise: fx.Node, taken: dict[fx.Node, Block]) -> Block:
    """Return the block around a depthwise convolution.

    Raises:
        DiffersError: with the reason why there is none.
    """
    expand = _origin(depthwise.args[0])
    if expand is None or not is_point(module, expand):
        raise DiffersError("no 1 x 1 convolution stands in front of it, as with an expand_ratio of 1")
    if expand in taken:
        raise DiffersError(f"{layer_name(expand)} in front of it belongs to another block")
    first, second = read_stage(module, expand), read_stage(module, depthwise)
    first, reader = _follow(module, first)
    if reader is not depthwise:
        raise DiffersError(
            f"{layer_name(expand)} is read by {layer_name(reader)}, not by the depthwise convolution"
        )
    second, project = _follow(module, second)
    third = read_stage(module, project)
    check_point(module, expand)
    check_depthwise(module, depthwise, len(stored_weight(module, expand)))
    check_point(module, project)
    stages = first, second, third
    check_masks(stages, stored_weight(module, depthwise).shape[-1], convolution_arguments(depthwise)[0])
    qparams = check_int8(module, stages)
    channels = stored_weight(module, expand).shape[1], len(stored_weight(module, project))
    can_add = channels[0] == channels[1] and is_all(convolution_arguments(depthwise)[0], 1)
    x, output = _find_residual(expand, third.end, taken, can_add=can_add, is_int8=qparams is not None)
    _check_memory(module, x, expand, output)
    return Block(x, stages, third.mask, output is not third.end, output, qparams)


def _follow(module: fx.GraphModule, stage: Stage) -> tuple[Stage, fx.Node]:
    """Return a stage with the parameters of its pair, if any, and the convolution that alone reads it.

    Raises:
        DiffersError: where there is none, or other operators read the output too.
    """
    reader, qparams = _sole_reader(stage, stage.end), None
    if reader.target is QUANTIZE:
        qparams, pair = qparams_of(reader), _sole_reader(stage, reader)
        if qparams is None or pair.target is not DEQUANTIZE or qparams_of(pair) != qparams:
            raise DiffersError(f"the output of {layer_name(stage.conv)} has no single scale and zero point")
        reader = _sole_reader(stage, pair)
    if not is_convolution(reader):
        raise DiffersError(_stands_between(stage, reader))
    return Stage(stage.conv, stage.activation, stage.function, stage.mask, stage.end, qparams), reader


def _stands_between(stage: Stage, reader: fx.Node) -> str:
    name = operator_name(reader) or str(reader.op)
    where = f"{name} stands behind {layer_name(stage.conv)}, in front of the next convolution"
    if name == "mul":
        return f"{where}: a factor that is no mask of 0 and 1 per position, made by a decision"
    if "pad" in name:
        return f"{where}: expected zero padding by the convolution itself"
    return f"{where}; expected one activation of {ACTIVATIONS_TAKEN}"


def _sole_reader(stage: Stage, node: fx.Node) -> fx.Node:
    readers = list(node.users)
    if len(readers) == 1:
        return readers[0]
    names = ", ".join(operator_name(reader) or reader.op for reader in readers)
    raise DiffersError(
        f"{len(readers)} operators read the output of {layer_name(stage.conv)} ({names}), as with a "
        "squeeze-and-excitation or a second branch: it cannot stay inside a kernel"
    )


def _find_residual(
    expand: fx.Node, end: fx.Node, taken: Collection[fx.Node], *, can_add: bool, is_int8: bool
) -> tuple[fx.Node, fx.Node]:
    """Return the value that a block reads and the call that computes y: a sum with this value, or ``end``.

    An INT8 block rounds its input. So its input may be the value in front of Q, or the rounded value; behind
    an INT8 layer outside of blocks it is the rounded one, because that layer's runtime needs an INT8 output.
    """
    x = expand.args[0]
    assert isinstance(x, fx.Node)
    quantize = x.args[0] if is_int8 else None
    is_pair = isinstance(quantize, fx.Node) and qparams_of(quantize) == qparams_of(x)
    source = quantize.args[0] if isinstance(quantize, fx.Node) and is_pair else None
    reader = only_reader(end)
    if can_add and reader is not None and operator_name(reader) == "add" and not reader.kwargs:
        # a sum written into x stays outside: later readers of x may want it
        term = None if is_in_place(reader) and reader.args[0] is not end else other_term(reader, end)
        if term is not None and (term in (x, source) or _same_values(term, x)):
            return term, reader
    is_alone = isinstance(quantize, fx.Node) and len(quantize.users) == len(x.users) == 1
    is_alone = is_alone and not _is_int8_output(source, taken)
    return (source if is_alone and isinstance(source, fx.Node) else x), end


def _is_int8_output(node: Any, taken: Collection[fx.Node]) -> bool:
    """Whether an INT8 layer outside of blocks computes a value, with the activation that runtimes fuse."""
    if isinstance(node, fx.Node) and node.target in FUSED_ACTIVATIONS:
        node = node.args[0]
    is_layer = isinstance(node, fx.Node) and node.target in MULTIPLY_ADD_OPS
    return is_layer and is_int8(node) and node not in taken


def _check_memory(module: fx.GraphModule, x: fx.Node, expand: fx.Node, output: fx.Node) -> None:
    """Refuse a block whose input is overwritten before the block ends, where its kernel reads it."""
    nodes = list(module.graph.nodes)
    for node in nodes[nodes.index(expand) : nodes.index(output)]:
        if is_in_place(node) and _memory(node.args[0]) is _memory(x):
            raise DiffersError(f"{operator_name(node)} overwrites the input of {layer_name(expand)} in place")


def _memory(node: Any) -> Any:
    """Return the node whose memory a value shares, through views and operators that work in place."""
    while isinstance(node, fx.Node) and (memory_of(node) is not node or is_in_place(node)):
        node = node.args[0] if is_in_place(node) else memory_of(node)
    return node


def _same_values(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes dequantize the same values."""
    return a.target is b.target is DEQUANTIZE and a.args == b.args


def _meets_point(module: fx.GraphModule, conv: fx.Node) -> bool:
    """Whether a 1 x 1 convolution is among the first that read a convolution's output."""
    seen: set[fx.Node] = set()
    waiting = list(conv.users)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if not is_convolution(node):
            waiting += node.users
        elif is_point(module, node):
            return True
    return False


def _origin(value: Any) -> fx.Node | None:
    """Return the convolution that computes a value, through operators with one feature map as input."""
    while isinstance(value, fx.Node) and value.op == "call_function" and not is_convolution(value):
        sums = operator_name(value) in ("add", "cat", "sub")
        maps = [] if sums else [node for node in value.all_input_nodes if _positions(node)]
        value = max(maps, key=_positions, default=None)
    return value if isinstance(value, fx.Node) and is_convolution(value) else None


def _positions(node: fx.Node) -> float:
    """Count the positions of a feature map of several channels; 0 of any other value.

    Q and DQ nodes have no known shape in some programs, and no other inputs.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return float(node.op == "call_function")
    return value.shape[2:].numel() if value.dim() == 4 and value.shape[1] > 1 else 0
