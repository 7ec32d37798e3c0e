"""The account of a program: its share of INT8 multiply-adds, and the reason for every float operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.graph.nodes import (
    COUNTED_OPS,
    FUSED_ACTIVATIONS,
    MULTIPLY_ADD_OPS,
    all_multiply_adds,
    has_stored_weight,
    is_int8,
    module_path,
)
from edgedyn.ops import is_ours

_BY_IMAGE = "normalises by the statistics of each image"
_KEPT_FLOAT = {
    "add": "residual sum: in INT8, one rounding error per block would add up",
    "sub": "residual sum: in INT8, one rounding error per block would add up",
    "mul": "product of two activations",
    "clamp": "follows a product of two activations",
    "upsample_bilinear2d": "slices generated kernels, or resizes a float activation",
    "bmm": "interpolates generated kernels",
    "mm": "interpolates generated kernels",
    "prelu": "its runtime kernel is float",
    "cat": "joins float activations",
    "constant_pad_nd": "pads a float activation",
    "max_pool2d": "its input is float",
    "avg_pool2d": "its input is float",
    "batch_norm": "normalises in float: no convolution in front that it alone reads",
    "instance_norm": _BY_IMAGE,
    "inverted_residual": "called by the network itself: its form three_convolutions may be INT8",
}
KEPT_BY_RECIPE = "kept in float by the recipe (quantize.keep_float)"
KEPT_FOR_QUALITY = "kept in float to meet the limit on the PSNR drop (quantize.max_drop_db)"
KEPT_ALWAYS = "decides or normalises: float32 in every precision"
KEPT_IN_BLOCK = "belongs to a block of which another layer is kept in float"
KEPT_GENERATED = "writes generated kernels, which stay float (quantize.generated)"
KEPT_OUTPUT_RESCALE = "scales the channels of an INT8 output back (rescale Mul)"
KEPT_INPUT_RESCALE = "scales the channels of an INT8 input to one range (rescale Mul)"
KEPT_SHIFT = "shifts an activation, or pads a shifted one, so that its zero point is 0"
_DYNAMIC = "its weight is computed from the image: runtimes keep only stored weights in INT8"
_NO_RULE = "no INT8 rule for this operator"
_GENERATED = "filters with generated kernels, which stay float"
# decomposing an op of ours decomposes the norms of the program, too
_DECOMPOSED_NORMS = {
    "_native_batch_norm_legit": "instance_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "native_group_norm": "group_norm",
    "native_layer_norm": "layer_norm",
}
# operators that compute nothing, although their output is no view of their input
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


def account(
    module: fx.GraphModule, reasons: Mapping[str, str], inside: Collection[fx.Node] = ()
) -> tuple[dict[str, object], ...]:
    """List the float operators of a program: ``{"node", "count", "reason"}``.

    Args:
        module: a program with Q/DQ pairs.
        reasons: why layers that could be INT8 are float, by node name.
        inside: operators that an INT8 kernel computes with its layers.
    """
    kept: Counter[tuple[str, str]] = Counter()
    for node in module.graph.nodes:
        if node.target in COUNTED_OPS:
            if not is_int8(node):
                reason = _NO_RULE if has_stored_weight(node) else _DYNAMIC
                kept[module_path(node) or node.name, reasons.get(node.name, reason)] += 1
        elif name := None if node in inside or _is_fused(node) else _float_operator(node):
            kept[_shown(node, name), reasons.get(node.name, _reason(node, name))] += 1
    return tuple({"node": node, "count": count, "reason": reason} for (node, reason), count in kept.items())


def _reason(node: fx.Node, name: str) -> str:
    if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
        return _BY_IMAGE if node.args[5] else _KEPT_FLOAT["batch_norm"]
    if name == "mul" and not all(isinstance(x, fx.Node) and x.op != "get_attr" for x in node.args[:2]):
        return _NO_RULE  # a constant scales an activation
    return _KEPT_FLOAT.get(name, _GENERATED if is_ours(node) else _NO_RULE)


def _shown(node: fx.Node, name: str) -> str:
    """Return the name of a float operator: a norm that could have been folded by its layer, too."""
    path = module_path(node) if name in ("batch_norm", "instance_norm") else ""
    return f"{path} ({name})" if path else name


def _is_fused(node: fx.Node) -> bool:
    """Whether a node is an activation inside an INT8 convolution."""
    source = node.args[0] if node.target in FUSED_ACTIVATIONS else None
    if not isinstance(source, fx.Node) or source.target not in MULTIPLY_ADD_OPS:
        return False
    quantizes = all(".quantize_per_tensor" in str(user.target) for user in node.users)
    return quantizes and all("dequantize" in str(x.target) for x in source.args[:2])  # type: ignore[union-attr]


def moves_only(node: fx.Node) -> bool:
    """Whether a node computes nothing: a view of its input, or the same values at other places."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.partition("::")[2].removesuffix("_")
    return bool(target.is_view) or name in _MOVES_ONLY


def _float_operator(node: fx.Node) -> str | None:
    """Return the name of a node's float operator, or None where it only moves values."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "quantized_decomposed":
        return None
    if moves_only(node) or not target._schema.returns or not node.all_input_nodes:
        return None  # an alias of its input, an assertion, a constant
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not value.is_floating_point():
        return None
    name = target._schema.name.partition("::")[2].removesuffix("_")  # relu_ works in place
    return _DECOMPOSED_NORMS.get(name, name)


def int8_share(program: ExportedProgram) -> tuple[float, int]:
    """Return the share of a program's multiply-adds that are INT8, and the number of nodes that have any."""
    costs = all_multiply_adds(program.graph)
    quantized = sum(cost for node, cost in costs.items() if is_int8(node))
    return (quantized / sum(costs.values()) if costs else 0.0), len(costs)
