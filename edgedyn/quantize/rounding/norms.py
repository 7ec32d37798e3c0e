"""BatchNorm re-estimation: every channel of an INT8 layer gets the mean and deviation that it had in float.

    s' = r s,   b' = mean(y) - r mean(s Q x')      r = std(y) / std(s Q x')

x' is what the layer reads in INT8, y what it wrote in float. BatchNorm is folded before the weights are
rounded, so what its new statistics would change goes where it went itself: the gain into the scales of the
weight, whose codes Q stay, the shift into the bias (Sun et al. 2019, "Hybrid 8-bit floating point training
and inference for deep neural networks").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx


def reestimate(
    node: fx.Node, inputs: Iterable[Tensor], outputs: Iterable[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gain of each output channel and the bias that goes with it, both (O,), float64.

    Args:
        node: the layer's call.
        inputs: what it reads in INT8, a tensor a sample.
        outputs: what it writes in float, before the activation.
        weight: as INT8 has it, (O, I / groups, ...).
    """
    given = tuple(node.args[3:])
    axis = -1 if node.target is torch.ops.aten.linear.default else 1
    found = (node.target(x, weight, None, *given) for x in inputs)  # type: ignore[operator]
    (mean, deviation), (wanted, wanted_deviation) = _moments(found, axis), _moments(outputs, axis)
    # a channel of one value has no deviation but what float32 rounds
    varies = deviation > 16 * torch.finfo(torch.float32).eps * mean.abs()
    gain = torch.where(varies, wanted_deviation / deviation, 1.0)
    return gain, wanted - gain * mean


def _moments(maps: Iterable[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over all maps, float64."""
    sums = []
    for y in maps:
        rows = y.movedim(axis, 0).flatten(1).double()
        sums.append(torch.stack([torch.full((len(rows),), rows.shape[1]), rows.sum(1), (rows**2).sum(1)]))
    count, total, squares = torch.stack(sums).sum(0)
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0).sqrt()
