"""Our ops as ONNX nodes that TensorRT computes with our plugins, and back to ordinary operators elsewhere.

    edgedyn.sliced_depthwise2d(x, grid, None, 3)  ->  edgedyn::SlicedDepthwise2d(x, grid; kernel_size=3, ...)
    quantize(op(dequantize(q), ...))              ->  the same node on INT8, between Q and DQ

TensorRT refuses Q -> DQ -> plugin -> Q -> DQ (NVIDIA/TensorRT#3055), so an op between INT8 tensors must be
one INT8 node. The ordinary operators stand in a file of their own beside the model: a local function of the
node's name inside it would be taken in place of the plugin, because TensorRT's parser looks there first
(``ModelImporter.cpp`` of onnx-tensorrt 10.1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops, targets
from edgedyn.errors import ModelError
from edgedyn.graph.constants import fold_constants
from edgedyn.targets.fuse import calls_kernels, fuse_int8
from edgedyn.targets.onnx_export import PLUGIN_DOMAIN, translate
from edgedyn.targets.tensorrt.signatures import NAMESPACE, SCALES, SIGNATURES, VERSION, Signature, node_type

if TYPE_CHECKING:
    import onnx


def with_nodes(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose ops of ours are ONNX nodes, in INT8 where they stand between INT8 tensors.

    The result is only to be exported: in PyTorch a node gives zeros.

    Raises:
        ModelError: for an op that has no row in ``SIGNATURES``.
    """
    if not calls_kernels(program):
        return program
    fused = fuse_int8(program)
    called = {node.target for node in fused.graph.nodes if ops.is_ours(node)}
    table = {overload: functools.partial(_node, overload) for overload in called}
    return fused.run_decompositions(table)  # type: ignore[no-any-return]


def _node(overload: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    """Emit the node of one call."""
    values: dict[str, Any] = {
        a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()
    }
    values |= dict(zip((a.name for a in overload._schema.arguments), args, strict=False)) | kwargs
    name = overload._schema.name.removeprefix("edgedyn::").removesuffix("_int8")
    signature = _signature(name)
    tensors = [values[tensor.removesuffix("?")] for tensor in signature.inputs]
    attributes = {key: _number(values[key], choices) for key, choices in signature.attributes.items()}
    attributes |= {key: values[key] for key in SCALES if key in values}
    x, shapes = tensors[0], [None if tensor is None else tensor.shape for tensor in tensors]
    return torch.onnx.ops.symbolic(
        f"{PLUGIN_DOMAIN}::{node_type(name)}",
        [tensors[k] for k in signature.node_order() if tensors[k] is not None],
        {**attributes, "plugin_version": VERSION, "plugin_namespace": NAMESPACE},
        dtype=x.dtype,
        shape=signature.output(*shapes),
        version=1,
    )


def _signature(name: str) -> Signature:
    if name not in SIGNATURES:
        raise ModelError(
            f"op {name!r} has no plugin; found plugins for {', '.join(SIGNATURES)}. Give it a row in "
            "edgedyn/targets/tensorrt/signatures.py, or pick a form of ordinary ops in the recipe."
        )
    return SIGNATURES[name]


def _number(value: Any, choices: Sequence[str]) -> int:
    return choices.index(value) if choices else int(value)


def has_nodes(model: onnx.ModelProto) -> bool:
    """Whether a model needs our plugins."""
    return any(_is_ours(node) for node in model.graph.node)


def _is_ours(node: onnx.NodeProto) -> bool:
    """Whether a node is one of our ops; a network may bring a plugin of its own."""
    return node.domain == PLUGIN_DOMAIN and node.op_type in map(node_type, SIGNATURES)


def expand_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each node of ours by ordinary operators: those of the op's form for TensorRT without plugins.

    They are made from what the model itself says of the node, its attributes, inputs and types; an INT8 node
    becomes DequantizeLinear, these operators, QuantizeLinear. So what runs on the result tests the nodes.
    """
    import onnx
    import onnx_ir

    calls = [node for node in model.graph.node if _is_ours(node)]
    pieces = _translate_pieces(model, calls)
    dynamic = [name for call in calls for name in _dynamic_inputs(model, call)]
    renamed = dict(zip((value.name for value in pieces.input), dynamic, strict=True))
    renamed |= dict(zip((v.name for v in pieces.output), (call.output[0] for call in calls), strict=True))
    decomposed = onnx.ModelProto()
    decomposed.CopyFrom(model)
    kept = [node for node in decomposed.graph.node if not _is_ours(node)]
    del decomposed.graph.node[:]
    decomposed.graph.node.extend(kept)
    for tensor in pieces.initializer:
        decomposed.graph.initializer.add().CopyFrom(tensor)
        decomposed.graph.initializer[-1].name = _inside(tensor.name, renamed)
    for node in pieces.node:
        added = decomposed.graph.node.add()
        added.CopyFrom(node)
        added.name = _inside(node.name, {})
        added.input[:] = [_inside(name, renamed) for name in node.input]
        added.output[:] = [_inside(name, renamed) for name in node.output]
    in_order = onnx_ir.from_proto(decomposed)
    if all(node.domain != PLUGIN_DOMAIN for node in kept):
        in_order.graph.opset_imports.pop(PLUGIN_DOMAIN)
    in_order.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(in_order)
    return result


def _inside(name: str, renamed: dict[str, str]) -> str:
    """Return a name of the pieces inside the model; empty is an absent input."""
    return renamed.get(name, f"decomposed/{name}" if name else "")


def _dynamic_inputs(model: onnx.ModelProto, call: onnx.NodeProto) -> list[str]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [name for name in call.input if name not in constants]


class _Pieces(nn.Module):
    """Every call of a model side by side; constants are its buffers, all else its inputs."""

    def __init__(self, model: onnx.ModelProto, calls: Sequence[onnx.NodeProto]) -> None:
        import onnx

        super().__init__()
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.calls = [_read_call(call) for call in calls]
        self.dynamic = [[name not in stored for name in call.input] for call in calls]
        for k, call in enumerate(calls):
            for i, name in enumerate(call.input):
                if name in stored:
                    value = torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy())
                    self.register_buffer(f"constant_{k}_{i}", value)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left, results = iter(tensors), []
        for k, (form, signature, attributes, scales) in enumerate(self.calls):
            given = [
                next(left) if is_input else getattr(self, f"constant_{k}_{i}")
                for i, is_input in enumerate(self.dynamic[k])
            ]
            x, *others = signature.arrange(given)
            results.append(_compute(form, x, [*others, *attributes], scales))
        return tuple(results)


def _compute(form: Any, x: Tensor, others: list[Any], scales: Sequence[float]) -> Tensor:
    """Compute an op by a form, between dequantize and quantize where it has scales."""
    if not scales:
        return form(x, *others)  # type: ignore[no-any-return]
    pair, limits = torch.ops.quantized_decomposed, (0, -128, 127, torch.int8)
    real = pair.dequantize_per_tensor.default(x, scales[0], *limits)
    y = form(real, *others)
    return pair.quantize_per_tensor.default(y, scales[1], *limits)  # type: ignore[no-any-return]


def _read_call(call: onnx.NodeProto) -> tuple[Any, Signature, list[Any], list[float]]:
    """Return form, signature, arguments behind the tensors, and scales of a node."""
    import onnx

    found = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
    op = {node_type(name): op for name, op in ops.load_all().items()}[call.op_type]
    signature = SIGNATURES[op.name]
    flags = {argument.name for argument in op.overload._schema.arguments if str(argument.type) == "bool"}
    values = [
        choices[found[name]] if choices else bool(found[name]) if name in flags else found[name]
        for name, choices in signature.attributes.items()
    ]
    form = ops.choose_form(op, targets.load("tensorrt"))
    return form.fn, signature, values, [found[name] for name in SCALES if name in found]


def _translate_pieces(model: onnx.ModelProto, calls: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
    """Export what the calls compute as one ONNX graph: an input a dynamic tensor, an output a call."""
    import onnx

    described = {
        value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.value_info)
    }
    wanted = [described[name] for call in calls for name in _dynamic_inputs(model, call)]
    examples = tuple(
        torch.zeros(
            [dim.dim_value for dim in kind.shape.dim],
            dtype=getattr(torch, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name),
        )
        for kind in wanted
    )
    program = fold_constants(torch.export.export(_Pieces(model, calls), examples))
    names = [f"in_{k}" for k in range(len(examples))]
    return translate(program, names, [f"out_{k}" for k in range(len(calls))]).graph
