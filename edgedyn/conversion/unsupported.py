"""Operators and ranks that a target cannot run, refused on the float program: before any image is read.

ordinary operators, real, ranks up to 4     every target runs them
anything else                              the target lowers the float program in memory (``Target.preview``)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.errors import ModelError, place_of
from edgedyn.graph.nodes import module_path
from edgedyn.targets import Target

# most networks hold nothing else, and a preview of a deep one takes seconds
_ORDINARY = {
    "_native_batch_norm_legit_no_training", "_unsafe_view", "abs", "adaptive_avg_pool2d", "add",
    "addmm", "avg_pool2d", "batch_norm", "bmm", "cat", "clamp", "clone", "constant_pad_nd",
    "contiguous", "conv2d", "conv_transpose2d", "div", "dropout", "elu", "exp", "expand", "flatten",
    "floor", "full_like", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "linear",
    "matmul", "max_pool2d", "maximum", "mean", "minimum", "mm", "mul", "neg", "pad", "permute",
    "pixel_shuffle", "pixel_unshuffle", "prelu", "relu", "relu6", "reshape", "rsqrt", "select",
    "sigmoid", "silu", "slice", "softmax", "softplus", "split", "sqrt", "squeeze", "sub", "sum",
    "tanh", "transpose", "unsqueeze", "upsample_bilinear2d", "upsample_nearest2d", "view",
}  # fmt: skip


def refuse_unsupported(programs: Mapping[str, ExportedProgram], target: Target) -> None:
    """Refuse float programs with operators or ranks that the target cannot run.

    Args:
        programs: by name, our ops decomposed to the forms of the target.
        target: that shall run them.

    Raises:
        ModelError: with operator, path of the layer and the user's line.
    """
    strange = [node for program in programs.values() for node in _strange_nodes(program)]
    if not strange:
        return
    try:
        unsupported = target.preview(programs)["unsupported"]
    except ModelError as error:
        found = [node for node in strange if _short_name(node) in str(error)] or strange
        raise ModelError(f"{error} The program has {_describe(found)}.") from error
    if unsupported:
        names = ", ".join(unsupported)
        found = [node for node in strange if _is_named(node, names)] or strange
        raise ModelError(
            f"target {target.name!r} cannot run {names}. The program has {_describe(found)}. Write this "
            "layer with other operators, or build for another target (edgedyn inspect compares them)."
        )


def _strange_nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        rank = value.dim() if isinstance(value, Tensor) else 0
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        is_complex = isinstance(value, Tensor) and value.is_complex()
        if rank > 4 or is_complex or (node.target.namespace == "aten" and _short_name(node) not in _ORDINARY):
            yield node


def _short_name(node: fx.Node) -> str:
    """Return the name of a node's operator without namespace and overload; ``relu_`` works in place."""
    return str(node.target._schema.name.partition("::")[2].removesuffix("_"))  # type: ignore[union-attr]


def _is_named(node: fx.Node, names: str) -> bool:
    """Whether a node's operator stands in a list of a runtime's names, which has one for all convolutions."""
    name = re.sub(r"^conv\d.*", "convolution", _short_name(node))
    return re.search(rf"\b{re.escape(name)}", names) is not None


def _describe(nodes: list[fx.Node]) -> str:
    """Return operator, layer and line of the first nodes, one per layer."""
    shown: dict[tuple[str, str], str] = {}
    for node in nodes:
        path = module_path(node) or "the network itself"
        value = node.meta.get("val")
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        line = place_of(node.meta.get("stack_trace") or "")
        shown.setdefault((path, _short_name(node)), f"{_short_name(node)}{shape} in {path}{line}")
    return "; ".join([*list(shown.values())[:3], *(["..."] if len(shown) > 3 else [])])
