"""Our ops as ONNX nodes for our TensorRT plugins, and their decomposition where there is no plugin.

    edgedyn.sliced_depthwise2d(x, grid, None, 3)  ->  edgedyn::SlicedDepthwise2d(x, grid; kernel_size=3, ...)
    quantize(op(dequantize(q), ...))              ->  the same node on INT8, between Q and DQ

TensorRT refuses Q -> DQ -> plugin -> Q -> DQ (NVIDIA/TensorRT#3055), so an op between INT8 tensors must be
one INT8 node. The decomposed model is a file of its own: TensorRT's parser would take a local function of the
node's name inside the model in place of the plugin, because it looks there first (``ModelImporter.cpp`` of
onnx-tensorrt 10.1).
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
from edgedyn.targets.onnx_export import PLUGIN_DOMAIN, to_checked_proto, translate_to_ir
from edgedyn.targets.tensorrt.signatures import NAMESPACE, SCALES, SIGNATURES, VERSION, Signature, node_type

if TYPE_CHECKING:
    import onnx
    import onnx_ir


def with_nodes(program: ExportedProgram) -> ExportedProgram:
    """Return a program with our ops as ONNX nodes, in INT8 between INT8 tensors.

    The result can only be exported: in PyTorch a node gives zeros.

    Raises:
        ModelError: for an op without a row in ``SIGNATURES``.
    """
    if not calls_kernels(program):
        return program
    fused = fuse_int8(program)
    called = {node.target for node in fused.graph.nodes if ops.is_ours(node)}
    table = {overload: functools.partial(_node, overload) for overload in called}
    return fused.run_decompositions(table)  # type: ignore[no-any-return]


def _node(overload: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    """Emit the ONNX node of one call."""
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


def _is_ours(node: onnx.NodeProto | onnx_ir.Node) -> bool:
    """Whether a node is one of our ops; a network may bring a plugin of its own."""
    return node.domain == PLUGIN_DOMAIN and node.op_type in map(node_type, SIGNATURES)


def decompose_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each node of ours by ordinary operators: the op's form for TensorRT without plugins.

    The operators come from attributes, inputs and types of the node itself, so a run of the result tests the
    nodes. An INT8 node becomes DequantizeLinear, the operators, QuantizeLinear.
    """
    import onnx_ir

    decomposed = onnx_ir.from_proto(model)
    graph = decomposed.graph
    calls = [node for node in graph if _is_ours(node)]
    _splice(graph, calls, _translate_calls(calls).graph)
    if all(node.domain != PLUGIN_DOMAIN for node in graph):
        graph.opset_imports.pop(PLUGIN_DOMAIN, None)
    graph.sort()
    return to_checked_proto(decomposed)


def _splice(graph: onnx_ir.Graph, calls: Sequence[onnx_ir.Node], pieces: onnx_ir.Graph) -> None:
    """Replace calls in their graph by the nodes of ``pieces``, which compute them.

    Args:
        graph: holds the calls; changed in place.
        calls: nodes of one output each.
        pieces: one input per dynamic input of a call, one output per call, in order; left empty.
    """
    inputs = [value for call in calls for value in _dynamic_inputs(call)]
    for placeholder, value in zip(pieces.inputs, inputs, strict=True):
        placeholder.replace_all_uses_with(value)
    results = list(pieces.outputs)
    pieces.outputs.clear()
    for constant in list(pieces.initializers.values()):
        pieces.initializers.pop(constant.name)
        constant.name = f"decomposed/{constant.name}"
        graph.register_initializer(constant)
    nodes = list(pieces)
    pieces.remove(nodes)
    for node in nodes:
        node.name = f"decomposed/{node.name}"
        for value in node.outputs:
            value.name = f"decomposed/{value.name}"
    for call, result in zip(calls, results, strict=True):
        result.name = call.outputs[0].name
        call.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(calls, safe=True)
    graph.extend(nodes)


def _dynamic_inputs(call: onnx_ir.Node) -> list[onnx_ir.Value]:
    return [value for value in call.inputs if value is not None and not value.is_initializer()]


class _Calls(nn.Module):
    """All calls of a model side by side; constants are buffers, other tensors are inputs."""

    def __init__(self, calls: Sequence[onnx_ir.Node]) -> None:
        super().__init__()
        self.calls = [_read_call(call) for call in calls]
        self.dynamic = [[not value.is_initializer() for value in call.inputs] for call in calls]
        for k, call in enumerate(calls):
            for i, value in enumerate(call.inputs):
                if value.is_initializer():
                    self.register_buffer(f"constant_{k}_{i}", torch.tensor(value.const_value.numpy()))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left, results = iter(tensors), []
        for k, (form, signature, attributes, scales) in enumerate(self.calls):
            inputs = [
                next(left) if is_dynamic else getattr(self, f"constant_{k}_{i}")
                for i, is_dynamic in enumerate(self.dynamic[k])
            ]
            x, *others = signature.arrange(inputs)
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


def _read_call(call: onnx_ir.Node) -> tuple[Any, Signature, list[Any], list[float]]:
    """Return form, signature, arguments after the tensors, and scales of a node."""
    attributes = {name: attribute.value for name, attribute in call.attributes.items()}
    op = {node_type(name): op for name, op in ops.load_all().items()}[call.op_type]
    signature = SIGNATURES[op.name]
    flags = {argument.name for argument in op.overload._schema.arguments if str(argument.type) == "bool"}
    arguments = [
        choices[attributes[name]]
        if choices
        else bool(attributes[name])
        if name in flags
        else attributes[name]
        for name, choices in signature.attributes.items()
    ]
    form = ops.choose_form(op, targets.load("tensorrt"))
    return form.fn, signature, arguments, [attributes[name] for name in SCALES if name in attributes]


def _translate_calls(calls: Sequence[onnx_ir.Node]) -> onnx_ir.Model:
    """Export the forms of all calls as one ONNX graph: one input per dynamic tensor, one output per call."""
    examples = tuple(
        torch.zeros(list(value.shape.numpy()), dtype=getattr(torch, value.dtype.numpy().name))
        for call in calls
        for value in _dynamic_inputs(call)
    )
    program = fold_constants(torch.export.export(_Calls(calls), examples))
    names = [f"in_{k}" for k in range(len(examples))]
    return translate_to_ir(program, names, [f"out_{k}" for k in range(len(calls))])
