"""Weight rounding by reconstruction: the int8 weights whose layer computes what the float layer computed.

    min over int8 Q, float b   sum over positions | s Q x' + b - (W x + c) |^2

x is what the float network feeds the layer, x' what the network feeds it that is INT8 up to here, s one scale
an output channel. With the second moments H = cov(x', x') and C = cov(y, x') of the calibration set that is a
quadratic form, and nothing is trained:

    W' = C H^-1                                     float weights that undo the error of x', if any can
    column i: q = round(w_i / s); later columns take over its error, - (w_i - s q) H^-1[i, i:] / H^-1[i, i]
    b = mean(y) - s Q mean(x')

The second line is optimal brain quantization in a fixed order (Frantar and Alistarh 2022, "Optimal Brain
Compression"; with the Cholesky factor of H^-1 it is GPTQ, Frantar et al. 2023), the objective that of
AdaRound (Nagel et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_DAMPING = 1e-3  # of H's mean diagonal: inputs that were hardly ever seen keep their weights
_BLOCK = 64


@dataclass(frozen=True)
class Moments:
    """Second moments of one group of a layer, over the positions of all samples; float64.

    Attributes:
        h: covariance of the inputs (D, D), D = channels of the group x taps.
        c: covariance of the wanted outputs with the inputs, (O, D).
        x: mean of the inputs (D,).
        y: mean of the wanted outputs (O,).
    """

    h: Tensor
    c: Tensor
    x: Tensor
    y: Tensor


def measure_moments(
    node: fx.Node, inputs: Iterable[Tensor], outputs: Iterable[Tensor], groups: int
) -> list[Moments]:
    """Measure the moments of a convolution or linear layer, one for each group of channels.

    Args:
        node: the layer's call, for its stride, padding and dilation.
        inputs: what it reads, a tensor a sample.
        outputs: what it should write, before its bias or after: a constant makes no difference to H and C.
        groups: of the convolution; 1 for a linear layer.
    """
    total: list[list[Tensor]] = []
    count = 0
    for x, y in zip(inputs, outputs, strict=True):
        columns, wanted = _columns(node, x, y)
        u, v = columns.chunk(groups), wanted.chunk(groups)
        count += columns.shape[1]
        parts = [[a @ a.t(), b @ a.t(), a.sum(1), b.sum(1)] for a, b in zip(u, v, strict=True)]
        parts = [[part.double() for part in group] for group in parts]
        total = (
            parts
            if not total
            else [[a + b for a, b in zip(p, q, strict=True)] for p, q in zip(total, parts, strict=True)]
        )
    found = []
    for xx, yx, x_sum, y_sum in total:
        x, y = x_sum / count, y_sum / count
        found.append(Moments(xx / count - torch.outer(x, x), yx / count - torch.outer(y, x), x, y))
    return found


def _columns(node: fx.Node, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the output positions read, (D, positions), and should be, (O, positions)."""
    if node.target is torch.ops.aten.linear.default:
        return x.reshape(-1, x.shape[-1]).t(), y.reshape(-1, y.shape[-1]).t()
    stride, padding, dilation = (_pair(value) for value in convolution_arguments(node)[:3])
    side = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    columns = F.unfold(x, side, dilation=dilation, padding=padding, stride=stride)
    return columns.transpose(0, 1).flatten(1), y.flatten(2).transpose(0, 1).flatten(1)


def convolution_arguments(node: fx.Node) -> tuple[Any, Any, Any, int]:
    """Return stride, padding, dilation and groups of a convolution's call."""
    if node.target is torch.ops.aten.convolution.default:
        stride, padding, dilation, _, _, groups = node.args[3:9]
        return stride, padding, dilation, int(groups)  # type: ignore[arg-type]
    given = [*node.args[3:], *((1, 1), (0, 0), (1, 1), 1)[len(node.args[3:]) :]]
    return given[0], given[1], given[2], int(given[3])  # type: ignore[arg-type]


def _pair(value: Any) -> tuple[int, int]:
    a, b = (value, value) if isinstance(value, int) else (value * 2)[:2]
    return int(a), int(b)


def reconstruct(weight: Tensor, scales: Tensor, moments: list[Moments]) -> tuple[Tensor, Tensor]:
    """Round a weight so that its layer's outputs stay; return int8 codes and the bias that goes with them.

    Args:
        weight: float weight, (O, I / groups, ...).
        scales: one an output channel, (O,).
        moments: of each group.

    Returns:
        Codes of the weight's shape, in [-127, 127], float64, and the bias (O,), float64.
    """
    codes, biases = [], []
    groups = len(moments)
    flat = weight.double().reshape(weight.shape[0], -1)
    for w, s, m in zip(flat.chunk(groups), scales.double().chunk(groups), moments, strict=True):
        q = _round_columns(_refit(w, m), s, _damped(m))
        codes.append(q)
        biases.append(m.y - (q * s[:, None]) @ m.x)
    return torch.cat(codes).reshape(weight.shape), torch.cat(biases)


def _refit(w: Tensor, moments: Moments) -> Tensor:
    """Return the weights nearest to w that compute the wanted outputs from the inputs as they are here."""
    change: Tensor = torch.linalg.solve(_damped(moments), (moments.c - w @ moments.h).t()).t()
    return w + change


def _damped(moments: Moments) -> Tensor:
    """Return H with a ridge: a share of its spread, and more than float32 leaves of what never changes."""
    spread, mean = moments.h.diagonal().mean(), (moments.x**2).mean()
    ridge = _DAMPING * spread + 16 * torch.finfo(torch.float32).eps * mean + 1e-30
    return moments.h + torch.eye(len(moments.h), dtype=moments.h.dtype) * ridge


def _round_columns(w: Tensor, scales: Tensor, h: Tensor) -> Tensor:
    """Round column by column, those with the most energy first; the rest takes over each error."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = w[:, order].clone(), torch.empty_like(w)
    for begin in range(0, w.shape[1], _BLOCK):  # the errors of a block reach what is behind it in one product
        end = min(begin + _BLOCK, w.shape[1])
        errors = torch.zeros(w.shape[0], end - begin, dtype=w.dtype)
        for i in range(begin, end):
            q = torch.clamp(torch.round(left[:, i] / scales), -127, 127)
            errors[:, i - begin] = error = (left[:, i] - q * scales) / factor[i, i]
            left[:, i:end] -= torch.outer(error, factor[i, i:end])
            codes[:, order[i]] = q
        left[:, end:] -= errors @ factor[begin:end, end:]
    return codes
