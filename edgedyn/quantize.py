"""From an expanded float program to the program that a target is given: folded, then INT8, half or float.

    x -> Q/DQ -> conv(int8 weights, one scale a channel) [-> Q/DQ -> PReLU -> Q/DQ -> conv ...] -> float adds

Only convolutions and linear layers are INT8, with the PReLU between them where the runtime keeps it so.
Residual sums, products of two activations, generated kernels and slicing stay float: the residual stream is
where an 8-bit step would be paid at every block. Each reader of a quantized feature map gets its own
dequantize.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import io
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.ops import is_ours
from edgedyn.quantized_graph import center, explicit_padding, halve, separate_readers, unshare_constants
from edgedyn.recipe import QuantizeSection
from edgedyn.targets import Int8Scheme

MULTIPLY_ADD_OPS = {
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.convolution.default,
}
_FUSED_ACTIVATIONS = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.relu6.default,
    torch.ops.aten.relu6_.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
}
# those, and the convolutions that no target has in INT8
COUNTED_OPS = MULTIPLY_ADD_OPS | {torch.ops.aten.conv2d.padding, torch.ops.aten.conv_transpose2d.input}
_KEPT_FLOAT = {
    "add": "sum of a residual stream: one 8-bit step a block would add up",
    "sub": "sum of a residual stream: one 8-bit step a block would add up",
    "mul": "product of two activations",
    "clamp": "follows a product of two activations",
    "upsample_bilinear2d": "slices generated kernels, or resizes a float stream",
    "bmm": "interpolates generated kernels",
    "mm": "interpolates generated kernels",
    "prelu": "its runtime kernel is float; it stands between Q/DQ pairs",
    "cat": "joins float streams",
    "max_pool2d": "its input is a float stream",
    "avg_pool2d": "its input is a float stream",
    "batch_norm": "could not be folded into a convolution",
}
_KEPT_BY_RECIPE = "kept in float by the recipe (quantize.keep_float)"
_KEPT_ALWAYS = "decides or normalises: float32 in every precision"
_NO_RULE = "no INT8 rule for this operator"
_GENERATED = "filters with generated kernels, which stay float"
# operators that are no view of their input and yet compute nothing
_MOVES_ONLY = {
    "_to_copy",
    "_unsafe_view",
    "channel_shuffle",
    "clone",
    "detach",
    "dropout",
    "flip",
    "full_like",
    "lift_fresh_copy",
    "ones_like",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "repeat_interleave",
    "roll",
    "tile",
    "zeros_like",
}


@dataclass(frozen=True)
class Quantized:
    """A program ready for lowering, and what was done to it.

    Attributes:
        program: BatchNorm folded; INT8 as ``quantized_decomposed`` Q/DQ pairs, half, or float32.
        int8_mac_share: multiply-adds of convolutions and linear layers that run in INT8, as a share of all.
        multiply_add_nodes: how many there are.
        float_nodes: ``{"node", "count", "reason"}`` of what stays float.
        table: a row a quantized tensor: name, scale, zero point.
    """

    program: ExportedProgram
    int8_mac_share: float = 0.0
    multiply_add_nodes: int = 0
    float_nodes: tuple[dict[str, object], ...] = ()
    table: tuple[dict[str, object], ...] = field(default=(), repr=False)


def fold(program: ExportedProgram) -> fx.GraphModule:
    """Fold every BatchNorm that follows a convolution into it; exact up to rounding of the weights.

    Convolutions called several times get a weight a call, because each may meet another BatchNorm.
    """
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    module = program.module()
    assert isinstance(module, fx.GraphModule)
    explicit_padding(module)
    unshare_constants(module, MULTIPLY_ADD_OPS)
    _fuse_conv_bn_(module)
    return module


def to_float(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    precision: str,
    float32: Collection[str] = frozenset(),
) -> Quantized:
    """Return the folded program in float32 or float16; modules of the classes ``float32`` stay float32."""
    module = fold(program)
    if precision == "fp16":
        # a copy: the program shares its tensors with the module, and halving would change both
        module, inputs = copy.deepcopy(module), tuple(x.half() for x in inputs)
        halve(module, {node for node in module.graph.nodes if belongs_to(node, float32)})
    return Quantized(torch.export.export(module, inputs))


def to_int8(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    *,
    scheme: Int8Scheme,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    float32: Collection[str] = frozenset(),
    kernels: Collection[Any] = frozenset(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quantized:
    """Calibrate on the samples and convert to INT8.

    Args:
        program: expanded float program.
        inputs: one set of example inputs, for the shapes.
        scheme: how the target annotates INT8.
        section: the recipe's ``quantize`` section: engine, bias correction, layers kept in float.
        samples: calibration inputs, each a tuple of tensors of the program's shapes.
        float32: names of module classes that are never quantized.
        kernels: overloads of our ops that the target computes in INT8 where x is.
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
    kept = dict.fromkeys(_matching(module, section.keep_float), _KEPT_BY_RECIPE)
    kept |= {node.name: _KEPT_ALWAYS for node in module.graph.nodes if belongs_to(node, float32)}
    quantizer = make_quantizer(scheme, kept, kernels)
    convert = {"torchao": _convert_torchao, "nncf": _convert_nncf}[section.engine]
    with torch.no_grad():
        converted = convert(module, quantizer, section, samples, progress)
    if scheme.symmetric:
        center(converted)
    separate_readers(converted)
    float_nodes, table = _account(converted, kept)
    exported = torch.export.export(converted, inputs)
    return Quantized(exported, *int8_share(exported), float_nodes, table)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node was traced from, or the empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def belongs_to(node: fx.Node, classes: Collection[str]) -> bool:
    """Whether a node was traced from inside a module of one of the classes, ``package.module.Class``."""
    stack = node.meta.get("nn_module_stack") or {}
    return any(kind in classes or getattr(kind, "__qualname__", "") in classes for _, kind in stack.values())


def _matching(module: fx.GraphModule, patterns: Sequence[str]) -> frozenset[str]:
    """Name the multiply-add nodes whose layer path matches a pattern (``*`` as in file names)."""
    layers = {n.name: module_path(n) for n in module.graph.nodes if n.target in MULTIPLY_ADD_OPS}
    for pattern in patterns:
        if not fnmatch.filter(layers.values(), pattern):
            near = ", ".join(list(layers.values())[:8])
            raise RecipeError(
                f"quantize.keep_float: {pattern!r} matches no layer; found {len(layers)} convolutions and "
                f"linear layers, the first are {near}. Use a dotted path; * matches any part."
            )
    return frozenset(name for name, path in layers.items() if any(fnmatch.fnmatch(path, p) for p in patterns))


def make_quantizer(
    scheme: Int8Scheme, keep_float: Collection[str] = frozenset(), kernels: Collection[Any] = frozenset()
) -> Any:
    """Make the PT2E quantizer of a scheme: int8 activations by tensor, symmetric int8 weights by channel.

    Where convolutions have no quantized output, a kernel's x gets its step only in front of readers that
    quantize y as well: an 8-bit rounding that saves no float feature map would be paid for nothing.

    torchao takes the range of an activation that has the least squared error over its histogram; NNCF has its
    own statistics and takes only types and schemes from here.
    """
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine,
        observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=2**-16),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-16),
    )

    def is_int8(node: fx.Node) -> bool:
        return node.target in MULTIPLY_ADD_OPS and node.name not in keep_float

    class Int8Quantizer(Quantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in model.graph.nodes:
                if node.target in kernels and not scheme.outputs and all(map(is_int8, node.users)):
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={node.args[0]: activation}, _annotated=True
                    )
                if not is_int8(node):
                    continue
                read = {node.args[0]: activation, node.args[1]: weight}
                last = fused_activation(node) or node
                for part in {node: None, last: None}:
                    part.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map=read if part is node else {},
                        output_qspec=activation if scheme.outputs and part is last else None,
                        _annotated=True,
                    )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Nothing to refuse: annotate writes only what the scheme allows."""

    return Int8Quantizer()


def fused_activation(node: fx.Node) -> fx.Node | None:
    """Return the ReLU or clamp that a runtime computes with the convolution: its only reader.

    Quantized in front of it, half of the 8-bit range would hold values that it sets to zero.
    """
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.target in _FUSED_ACTIVATIONS else None


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

    reads = itertools.count(1)

    def read(sample: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        progress(min(next(reads), len(samples)), len(samples))
        return sample[0] if len(sample) == 1 else sample

    nncf.set_log_level(logging.ERROR)
    # its progress bars; standard output is the command's result
    with contextlib.redirect_stdout(io.StringIO()):
        return quantize_pt2e(  # type: ignore[no-any-return]
            module,
            quantizer,
            nncf.Dataset(list(samples), read),
            subset_size=len(samples),
            fast_bias_correction={"fast": True, "full": False, "none": None}[section.bias_correction],
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        )


def _account(
    module: fx.GraphModule, reasons: Mapping[str, str]
) -> tuple[tuple[dict[str, object], ...], tuple[dict[str, object], ...]]:
    """List what stays float, and read the scales."""
    kept: Counter[tuple[str, str]] = Counter()
    table = []
    for node in module.graph.nodes:
        if node.target in COUNTED_OPS:
            if not _is_int8(node):
                kept[module_path(node) or node.name, reasons.get(node.name, _NO_RULE)] += 1
        elif _is_fused(node):
            continue
        elif name := _float_operator(node):
            reason = _GENERATED if is_ours(node) else _KEPT_FLOAT.get(name, _NO_RULE)
            kept[name, reasons.get(node.name, reason)] += 1
        elif str(node.target).startswith("quantized_decomposed.quantize_per_tensor"):
            table.append(
                {"tensor": str(node.args[0]), "scale": float(node.args[1]), "zero_point": int(node.args[2])}
            )
    rows = tuple({"node": node, "count": count, "reason": reason} for (node, reason), count in kept.items())
    return rows, tuple(table)


def _is_fused(node: fx.Node) -> bool:
    """Whether a node is an activation inside an INT8 convolution."""
    source = node.args[0] if node.target in _FUSED_ACTIVATIONS else None
    if not isinstance(source, fx.Node) or source.target not in MULTIPLY_ADD_OPS:
        return False
    quantizes = all(".quantize_per_tensor" in str(user.target) for user in node.users)
    return quantizes and all("dequantize" in str(x.target) for x in source.args[:2])  # type: ignore[union-attr]


def _float_operator(node: fx.Node) -> str | None:
    """Return the name of the operator that a node computes in float, or None where it only moves values."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "quantized_decomposed":
        return None
    if target.is_view or not target._schema.returns or not node.all_input_nodes:
        return None  # an alias of its input, an assertion, a constant
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not value.is_floating_point():
        return None
    name = target._schema.name.partition("::")[2].removesuffix("_")  # relu_ works in place
    return None if name in _MOVES_ONLY else name


def int8_share(program: ExportedProgram) -> tuple[float, int]:
    """Return the share of multiply-adds that a program computes in INT8, and how many nodes have some."""
    nodes = [node for node in program.graph.nodes if node.target in COUNTED_OPS]
    costs = {node: multiply_adds(node) for node in nodes}
    quantized = sum(cost for node, cost in costs.items() if _is_int8(node))
    return (quantized / sum(costs.values()) if costs else 0.0), len(nodes)


def _is_int8(node: fx.Node) -> bool:
    """Whether a convolution or linear layer reads dequantized values and weights only."""
    return all(isinstance(x, fx.Node) and "dequantize" in str(x.target) for x in node.args[:2])


def multiply_adds(node: fx.Node) -> int:
    """Count the multiply-adds of a convolution or linear node from its shapes."""
    weight, out = node.args[1].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if node.target is torch.ops.aten.conv_transpose2d.input:
        out = node.args[0].meta["val"]  # type: ignore[union-attr]  # each input value meets a whole kernel
    if node.target is torch.ops.aten.linear.default:
        return int(weight.numel() * math.prod(out.shape[:-1]))
    return int(weight[0].numel() * out.numel())
