"""Fixes of programs for XNNPACK: exact graph rewrites, in the order of ``PASSES``.

    conv -> Q -> DQ -> {conv, mul}                  conv -> Q -> {DQ -> conv, DQ -> mul}
    conv -> Q -> DQ -> pad -> mul                   conv -> Q -> DQ -> pad -> Q -> DQ -> mul
    pad -1                                          slice

They run twice: on the captured program, before INT8 calls of our kernels are fused, and on the edge program,
because ExecuTorch decomposes operators in between: an unfold into a pad and an index, a softplus into four
readers of its input. Each pass names the symptom that it prevents and the last version that shows it. It can
go once the cases in ``tests/targets/test_lowering_passes.py`` lower and run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from executorch.exir.dialects._ops import ops as edge_ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.pass_base import PassResult
from torch import fx
from torch.export import ExportedProgram

from edgedyn.graph.nodes import is_int8, module_path

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_QUANTIZE_BY_IMAGE = torch.ops.quantized_decomposed.quantize_per_tensor.tensor
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_PADS = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}
_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default}

Pass = Callable[[fx.GraphModule], bool]


def quantize_pads(module: fx.GraphModule) -> bool:
    """Insert a Q/DQ pair between a zero pad of dequantized values and its float consumers.

    Exact: zero and the padded values lie on the grid of the pad's input, whose quantization parameters the
    pair takes. Without it XNNPACK quantizes the pad's input and not its output, and the program dies when it
    is loaded: "Failed to create StaticConstantPad node" (executorch 1.5.1).

    Returns:
        Whether a pair was inserted.
    """
    pads = [n for n in module.graph.nodes if _is_zero_pad(n) and _operator(n.args[0]) is _DEQUANTIZE]
    return any([_quantize_output(module, pad) for pad in pads])


def duplicate_dequantize(module: fx.GraphModule) -> bool:
    """Give every consumer of dequantized values a dequantize node of its own.

    XNNPACK changes the layout of a dequantize node's output for one consumer and passes the result to all of
    them; the program dies at its first run: "Propagating input shapes failed" (executorch 1.5.1). Consumers
    that want the same values in the same layout keep one node: the quantize of a range per image with the
    node that finds the range, and the float convolutions of one layer.

    Returns:
        Whether a node was added.
    """
    added = False
    for node in [n for n in module.graph.nodes if _operator(n) is _DEQUANTIZE]:
        groups: dict[Hashable, list[fx.Node]] = {}
        for consumer in node.users:
            groups.setdefault(_sharing_key(consumer), []).append(consumer)
        for consumers in list(groups.values())[1:]:
            with module.graph.inserting_before(consumers[0]):
                own = module.graph.node_copy(node)
            for consumer in consumers:
                consumer.replace_input_with(node, own)
            added = True
    return added


def slice_negative_pads(module: fx.GraphModule) -> bool:
    """Replace negative padding, which crops, by slices; positive sides of the same call stay a pad.

    The portable kernel has no other: "Padding values must be non-negative" (executorch 1.5.1).

    Returns:
        Whether a pad was replaced.
    """
    pads = [n for n in module.graph.nodes if _operator(n) in _PADS and min(_sides(n), default=0) < 0]
    for pad in pads:
        slices = torch.ops.aten.slice.Tensor
        if isinstance(pad.target, EdgeOpOverload):
            slices = edge_ops.edge.aten.slice_copy.Tensor
        cropped, sides = pad.args[0], _sides(pad)
        assert isinstance(cropped, fx.Node)
        with module.graph.inserting_before(pad):
            for k in range(0, len(sides), 2):
                value = cropped.meta["val"]
                axis = value.dim() - 1 - k // 2
                begin, end = max(0, -sides[k]), value.shape[axis] - max(0, -sides[k + 1])
                if (begin, end) != (0, value.shape[axis]):
                    cropped = module.graph.call_function(slices, (cropped, axis, begin, end))
                    val = value.narrow(axis, begin, end - begin).contiguous()
                    cropped.meta = {**pad.meta, "val": val}
        pad.args = (cropped, [max(0, side) for side in sides], *pad.args[2:])
        if not any(_sides(pad)):
            pad.replace_all_uses_with(cropped)
            module.graph.erase_node(pad)
    return bool(pads)


PASSES: tuple[Pass, ...] = (slice_negative_pads, quantize_pads, duplicate_dequantize)


def apply_passes(program: ExportedProgram) -> ExportedProgram:
    """Return the program after ``PASSES``; the same object where none of them changes it."""
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    if not any([change(module) for change in PASSES]):
        return program
    module.recompile()
    assert program.example_inputs is not None  # torch.export keeps them
    return torch.export.export(module, *program.example_inputs)


def apply_edge_passes(module: fx.GraphModule) -> PassResult:
    """Apply ``PASSES`` to the graph of an edge program, in place: a pass of ExecuTorch's own interface."""
    is_changed = any([change(module) for change in PASSES])
    if is_changed:
        module.recompile()
    return PassResult(module, is_changed)


def _operator(node: fx.Node) -> object:
    """Return the operator of torch that a node of a captured or edge program calls."""
    return node.target._op if isinstance(node.target, EdgeOpOverload) else node.target


def _sharing_key(consumer: fx.Node) -> Hashable:
    """Return a key that consumers have in common which may share a dequantize node."""
    if _operator(consumer) is _QUANTIZE_BY_IMAGE:
        scale = consumer.args[1]
        assert isinstance(scale, fx.Node)
        return scale.args[0]  # type: ignore[return-value]
    if _operator(consumer) in _CONVOLUTIONS and not is_int8(consumer):
        return module_path(consumer)  # a form of an op runs several
    return consumer


def _sides(pad: fx.Node) -> list[int]:
    """Return how far a pad reaches on each side, the last axis first."""
    return list(pad.args[1])  # type: ignore[arg-type]


def _is_zero_pad(node: fx.Node) -> bool:
    rest = [arg for arg in node.args[2:] if arg not in ("constant", None, 0)]
    return _operator(node) in _PADS and not rest


def _quantize_output(module: fx.GraphModule, pad: fx.Node) -> bool:
    """Insert the pair of one pad, unless all its consumers quantize; return whether it was inserted."""
    consumers = [user for user in pad.users if _operator(user) is not _QUANTIZE]
    if not consumers:
        return False
    before = pad.args[0]
    assert isinstance(before, fx.Node)
    qparams = before.args[1:]
    quantize = edge_ops.edge.quantized_decomposed.quantize_per_tensor.default
    with module.graph.inserting_after(pad):
        quantized = module.graph.call_function(
            quantize if isinstance(pad.target, EdgeOpOverload) else _QUANTIZE, (pad, *qparams)
        )
    with module.graph.inserting_after(quantized):
        dequantized = module.graph.call_function(before.target, (quantized, *qparams))  # type: ignore[arg-type]
    quantized.meta, dequantized.meta = {**pad.meta, "val": pad.meta["val"].to(torch.int8)}, dict(pad.meta)
    for consumer in consumers:
        consumer.replace_input_with(pad, dequantized)
    return True
