"""Signatures of our ops for TensorRT: inputs, attributes and output shape. No torch and no TensorRT.

An op's ONNX node and its Python plugin come from its row here; its C++ plugin repeats the row in
``edgedyn/ops/<op>/plugin_tensorrt.cpp``. The node of ``masked_conv2d``:

    edgedyn::MaskedConv2d(x, weight, mask[, bias]; stride=1, ..., activation=2)
    the same with x_scale and y_scale where x and y are INT8

Tensors are in the schema's order, but the optional one is last. An absent one is left out, because not every
version of TensorRT's parser takes an empty input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NAMESPACE = "edgedyn"  # of the plugins, and the ONNX domain
VERSION = "1"
SCALES = ("x_scale", "y_scale")  # of an INT8 node; zero points are 0 on TensorRT


@dataclass(frozen=True)
class Signature:
    """Inputs, attributes and output shape of an op's node.

    Attributes:
        inputs: names of the tensors in the schema's order; one may end in ``?``, it is optional.
        attributes: names of the other arguments in the schema's order, with the choices of a str: a node
            holds the index of the choice.
        output: computes the dimensions of y from those of the inputs, in the schema's order; for integers
            and any type with ``*`` and ``//``.
    """

    inputs: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    output: Callable[..., tuple[Any, ...]]

    def node_order(self) -> list[int]:
        """Return the index in the schema of each of a node's inputs, the optional one last."""
        return sorted(range(len(self.inputs)), key=lambda k: self.inputs[k].endswith("?"))

    def arrange(self, inputs: list[Any]) -> list[Any]:
        """Return a node's inputs in the schema's order, None where the optional one is absent."""
        values = dict(zip(self.node_order(), inputs, strict=False))
        return [values.get(k) for k in range(len(self.inputs))]


def node_type(op: str) -> str:
    """Return ``SlicedDepthwise2d`` of ``sliced_depthwise2d``."""
    return "".join(word.capitalize() for word in op.split("_"))


SIGNATURES = {
    "atom_depthwise2d": Signature(
        ("x", "alpha", "bases"),
        {"kernel_size": (), "stride": ()},
        lambda x, alpha, bases: (x[0], x[1] * alpha[1] // bases[0], alpha[2], alpha[3]),
    ),
    "decoupled_depthwise2d": Signature(
        ("x", "channel_filter", "spatial_filter"),
        {"kernel_size": (), "stride": (), "dilation": (), "heads": (), "combine": ("mul", "add")},
        lambda x, channel, spatial: (x[0], x[1], spatial[2], spatial[3]),
    ),
    "masked_conv2d": Signature(
        ("x", "weight", "bias?", "mask"),
        {"stride": (), "padding": (), "dilation": (), "groups": (), "activation": ("none", "relu", "relu6")},
        lambda x, weight, bias, mask: (x[0], weight[0], mask[2], mask[3]),
    ),
    "sliced_depthwise2d": Signature(
        ("x", "grid", "offset?"),
        {"kernel_size": (), "dilation": (), "align_corners": ()},
        lambda x, grid, offset: (x[0], x[1], x[2], x[3]),
    ),
}
