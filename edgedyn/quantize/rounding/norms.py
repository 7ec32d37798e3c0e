"""BatchNorm re-estimation: restore the float mean and deviation of every output channel of an INT8 layer.

    s' = r s,   b' = mean(y) - r mean(s Q x')      r = std(y) / std(s Q x')

x' is the INT8 input of the layer, y its float output, Q the quantized weight, s its scales. BatchNorm is
folded before weights are rounded, so that new statistics would change the layer itself: their gain multiplies
the scales, and Q stays; their shift goes into the bias (Sun et al. 2019, "Hybrid 8-bit floating point
training and inference for deep neural networks").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx


def reestimate(
    node: fx.Node, inputs: Iterable[Tensor], outputs: Iterable[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gain and the new bias of each output channel, both (O,), float64.

    Args:
        node: the layer's call.
        inputs: its INT8 inputs, one tensor per sample.
        outputs: its float outputs before the activation, one tensor per sample.
        weight: the rounded weight, (O, I / groups, ...).
    """
    options = tuple(node.args[3:])
    axis = -1 if node.target is torch.ops.aten.linear.default else 1
    int8_outputs = (node.target(x, weight, None, *options) for x in inputs)  # type: ignore[operator]
    mean, deviation = _moments(int8_outputs, axis)
    float_mean, float_deviation = _moments(outputs, axis)
    # the deviation of a constant channel is nothing but float32 rounding
    varies = deviation > 16 * torch.finfo(torch.float32).eps * mean.abs()
    gain = torch.where(varies, float_deviation / deviation, 1.0)
    return gain, float_mean - gain * mean


def _moments(outputs: Iterable[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over all outputs, float64."""
    sums = []
    for y in outputs:
        rows = y.movedim(axis, 0).flatten(1).double()
        sums.append(torch.stack([torch.full((len(rows),), rows.shape[1]), rows.sum(1), (rows**2).sum(1)]))
    count, total, squares = torch.stack(sums).sum(0)
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0).sqrt()
