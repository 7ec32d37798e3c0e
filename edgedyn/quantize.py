"""From an expanded float program to the program that a target is given: folded, then INT8, half or float.

    x -> Q/DQ -> conv(int8 weights, one scale a channel) [-> Q/DQ -> PReLU -> Q/DQ -> conv ...] -> float adds

Only convolutions and linear layers are INT8, with the PReLU between them where the runtime keeps it so. Residual sums,
products of two activations, generated kernels and slicing stay float: the residual stream is where an 8-bit step would
be paid at every block, and a feature map that leaves a quantized chain for two consumers makes XNNPACK fail at run
time ("Propagating input shapes failed", executorch 1.5.1). Each consumer therefore gets its own Q/DQ pair.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.recipe import QuantizeSection
from edgedyn.targets import Int8Scheme

MULTIPLY_ADD_OPS = {
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.convolution.default,
}
_KEPT_FLOAT = {
    "add": "sum of a residual stream: one 8-bit step a block would add up",
    "sub": "sum of a residual stream: one 8-bit step a block would add up",
    "mul": "product of two activations",
    "clamp": "follows a product of two activations",
    "upsample_bilinear2d": "slices generated kernels, or resizes a float stream",
    "prelu": "its runtime kernel is float; it stands between Q/DQ pairs",
    "cat": "joins float streams",
    "max_pool2d": "its input is a float stream",
    "avg_pool2d": "its input is a float stream",
    "batch_norm": "could not be folded into a convolution",
}


@dataclass(frozen=True)
class Quantized:
    """A program ready for lowering, and what was done to it.

    Attributes:
        program: BatchNorm folded; INT8 as ``quantized_decomposed`` Q/DQ pairs, half, or float32.
        int8_mac_share: multiply-adds of convolutions and linear layers that run in INT8, divided by all of them.
        float_nodes: ``{"node", "count", "reason"}`` of what stays float.
        table: a row a quantized tensor: name, scale, zero point.
    """

    program: ExportedProgram
    int8_mac_share: float = 0.0
    float_nodes: tuple[dict[str, object], ...] = ()
    table: tuple[dict[str, object], ...] = field(default=(), repr=False)


def fold(program: ExportedProgram) -> fx.GraphModule:
    """Fold every BatchNorm that follows a convolution into it; exact up to rounding of the weights."""
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    module = program.module()
    assert isinstance(module, fx.GraphModule)
    _fuse_conv_bn_(module)
    return module


def to_float(program: ExportedProgram, inputs: tuple[Tensor, ...], precision: str) -> Quantized:
    """Return the folded program in float32 or float16."""
    module: nn.Module = fold(program)
    if precision == "fp16":
        module, inputs = module.half(), tuple(x.half() for x in inputs)
    return Quantized(torch.export.export(module, inputs))


def to_int8(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    *,
    scheme: Int8Scheme,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quantized:
    """Calibrate on the samples and convert to INT8.

    Args:
        program: expanded float program.
        inputs: one set of example inputs, for the shapes.
        scheme: how the target annotates INT8.
        section: the recipe's ``quantize`` section: engine, bias correction, layers kept in float.
        samples: calibration inputs, each a tuple of tensors of the program's shapes.
        progress: called with (samples seen, samples); the NNCF engine reads them several times.

    Raises:
        CalibrationError: when there are no samples.
        RecipeError: when a pattern of ``keep_float`` matches no layer.
    """
    if not samples:
        raise CalibrationError(
            "there are no calibration samples; INT8 needs at least one image. Mend the set."
        )
    module = fold(program)
    _unshare_constants(module)
    macs = {node.name: multiply_adds(node) for node in module.graph.nodes if node.target in MULTIPLY_ADD_OPS}
    quantizer = make_quantizer(scheme, _matching(module, section.keep_float))
    convert = {"torchao": _convert_torchao, "nncf": _convert_nncf}[section.engine]
    with torch.no_grad():
        converted = convert(module, quantizer, section, samples, progress)
    _separate_readers(converted)
    share, float_nodes, table = _account(converted, macs)
    return Quantized(torch.export.export(converted, inputs), share, float_nodes, table)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node was traced from, or the empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def _matching(module: fx.GraphModule, patterns: Sequence[str]) -> frozenset[fx.Node]:
    """Return the multiply-add nodes whose layer path matches a pattern (``*`` as in file names)."""
    layers = {node: module_path(node) for node in module.graph.nodes if node.target in MULTIPLY_ADD_OPS}
    for pattern in patterns:
        if not fnmatch.filter(layers.values(), pattern):
            near = ", ".join(list(layers.values())[:8])
            raise RecipeError(
                f"quantize.keep_float: {pattern!r} matches no layer; found {len(layers)} convolutions and linear "
                f"layers, the first are {near}. Use a dotted path; * matches any part."
            )
    return frozenset(n for n, path in layers.items() if any(fnmatch.fnmatch(path, p) for p in patterns))


def make_quantizer(scheme: Int8Scheme, keep_float: frozenset[fx.Node] = frozenset()) -> Any:
    """Make the PT2E quantizer of a scheme: int8 activations by tensor, int8 weights by channel, symmetric weights."""
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine,
        observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-16),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-16),
    )

    class Int8Quantizer(Quantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            kept = {node.name for node in keep_float}
            for node in model.graph.nodes:
                if node.target not in MULTIPLY_ADD_OPS or node.name in kept:
                    continue
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[0]: activation, node.args[1]: weight},
                    output_qspec=activation if scheme.outputs else None,
                    _annotated=True,
                )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Nothing to refuse: annotate writes only what the scheme allows."""

    return Int8Quantizer()


def _convert_torchao(
    module: fx.GraphModule,
    quantizer: Any,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    progress: Any,
) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(module, quantizer)
    for done, sample in enumerate(samples):
        prepared(*sample)
        progress(done + 1, len(samples))
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


def _convert_nncf(
    module: fx.GraphModule,
    quantizer: Any,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    progress: Any,
) -> fx.GraphModule:
    import nncf
    from nncf.experimental.torch.fx import quantize_pt2e
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    return quantize_pt2e(  # type: ignore[no-any-return]
        module,
        quantizer,
        nncf.Dataset(list(samples), lambda sample: sample[0] if len(sample) == 1 else sample),
        subset_size=len(samples),
        fast_bias_correction={"fast": True, "full": False, "none": None}[section.bias_correction],
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
    )


def _unshare_constants(module: fx.GraphModule) -> None:
    """Give every convolution and linear layer its own weight and bias, also where the network calls a layer twice.

    XNNPACK keeps a shared bias in the steps of its first reader, silently wrong at the second (executorch 1.5.1), and
    NNCF quantizes a shared weight at one place only (3.4).
    """
    seen: set[str] = set()
    for node in [n for n in module.graph.nodes if n.target in MULTIPLY_ADD_OPS]:
        for index, constant in enumerate(node.args[1:3], start=1):
            if isinstance(constant, fx.Node) and constant.op == "get_attr" and constant.target in seen:
                name = f"{str(constant.target).replace('.', '_')}_of_{node.name}"
                module.register_buffer(name, operator.attrgetter(str(constant.target))(module).detach().clone())
                with module.graph.inserting_before(node):
                    copied = module.graph.get_attr(name)
                copied.meta = dict(constant.meta)
                node.update_arg(index, copied)
            elif isinstance(constant, fx.Node):
                seen.add(str(constant.target))
    module.recompile()


def _separate_readers(module: fx.GraphModule) -> None:
    """Give every reader its own dequantize; no number changes.

    XNNPACK (executorch 1.5.1) changes the layout of a dequantize for one reader and hands the result to all ("Propagating
    input shapes failed"). It also makes a pad between a dequantize and a float reader half quantized ("Failed to create
    StaticConstantPad node"), unless a quantize follows.
    """
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(module.graph.nodes):
        if _is_zero_pad(node) and node.args[0].target is dequantize:
            _quantize_again(module, node)
    for node in [n for n in module.graph.nodes if n.target is dequantize]:
        for reader in list(node.users)[1:]:
            with module.graph.inserting_before(reader):
                reader.replace_input_with(node, module.graph.node_copy(node))
    module.recompile()


def _is_zero_pad(node: fx.Node) -> bool:
    rest = [arg for arg in node.args[2:] if arg not in ("constant", None, 0)]
    return node.target in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default) and not rest


def _quantize_again(module: fx.GraphModule, pad: fx.Node) -> None:
    """Follow a pad by a Q/DQ pair of its input's step, unless all its readers quantize.

    Exact: zero and the padded values lie on that grid.
    """
    pair = torch.ops.quantized_decomposed
    readers = [user for user in pad.users if user.target is not pair.quantize_per_tensor.default]
    if not readers:
        return
    step = pad.args[0].args[1:]  # type: ignore[union-attr]
    with module.graph.inserting_after(pad):
        quantized = module.graph.call_function(pair.quantize_per_tensor.default, (pad, *step))
    with module.graph.inserting_after(quantized):
        dequantized = module.graph.call_function(pair.dequantize_per_tensor.default, (quantized, *step))
    for node in (quantized, dequantized):
        node.meta = dict(pad.meta)
    for reader in readers:
        reader.replace_input_with(pad, dequantized)


def _account(
    module: fx.GraphModule, macs: dict[str, int]
) -> tuple[float, tuple[dict[str, object], ...], tuple[dict[str, object], ...]]:
    """Measure the INT8 share of multiply-adds, list what stays float, and read the scales."""
    total = quantized = 0
    kept: dict[tuple[str, str], int] = {}
    table = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
        if node.target in MULTIPLY_ADD_OPS:
            is_int8 = all("dequantize" in str(a.target) for a in node.args[:2])
            total, quantized = total + macs[node.name], quantized + macs[node.name] * is_int8
            if not is_int8:
                key = (module_path(node) or node.name, "kept in float by the recipe (quantize.keep_float)")
                kept[key] = kept.get(key, 0) + 1
        elif name in _KEPT_FLOAT:
            kept[(name, _KEPT_FLOAT[name])] = kept.get((name, _KEPT_FLOAT[name]), 0) + 1
        elif name.startswith("quantize_per_tensor"):
            table.append(
                {"tensor": str(node.args[0]), "scale": float(node.args[1]), "zero_point": int(node.args[2])}
            )
    rows = tuple({"node": node, "count": count, "reason": reason} for (node, reason), count in kept.items())
    return (quantized / total if total else 0.0), rows, tuple(table)


def multiply_adds(node: fx.Node) -> int:
    """Count the multiply-adds of a convolution or linear node from its shapes."""
    weight, out = node.args[1].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if node.target is torch.ops.aten.linear.default:
        return int(weight.numel() * math.prod(out.shape[:-1]))
    return int(weight[0].numel() * out.numel())
