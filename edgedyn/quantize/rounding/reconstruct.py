"""Weight rounding by reconstruction: INT8 weights whose layer reproduces the outputs of the float layer.

    min over int8 Q, float b   sum over positions | s Q x' + b - (W x + c) |^2

x is the layer's input in the float run, x' its input with all earlier layers in INT8, y = W x + c the float
output, s one scale per output channel. With the second moments H = cov(x', x') and C = cov(y, x') of the
calibration set the objective is a quadratic form, so that nothing needs training:

    W' = C H^-1                                     float weights that undo the error of x', if any can
    column i: q = round(w_i / s); later columns absorb its error, - (w_i - s q) H^-1[i, i:] / H^-1[i, i]
    b = mean(y) - s Q mean(x')

The second line is optimal brain quantization in a fixed order (Frantar and Alistarh 2022, "Optimal Brain
Compression"; with the Cholesky factor of H^-1 it is GPTQ, Frantar et al. 2023). The objective is that of
AdaRound (Nagel et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from edgedyn.graph.nodes import channel_axis, convolution_arguments, weight_shape

_DAMPING = 1e-3  # share of H's mean diagonal: inputs that were hardly ever active keep their weights
# factors of the ridge: H is the difference of two float32 sums, and where a feature map's mean is far above
# its spread, their rounding leaves eigenvalues below zero
_RIDGES = (1.0, 10.0, 100.0, 1000.0)
_BLOCK = 64  # columns
_STRETCH = 1024  # positions


@dataclass(frozen=True)
class Moments:
    """Second moments of one group of a layer, over the positions of all samples; float64.

    Attributes:
        h: covariance of the inputs (D, D), D = channels of the group x taps.
        c: covariance of the float outputs with the inputs, (O, D).
        x: mean of the inputs (D,).
        y: mean of the float outputs (O,).
    """

    h: Tensor
    c: Tensor
    x: Tensor
    y: Tensor


def measure_moments(
    node: fx.Node, inputs: Iterable[Tensor], outputs: Iterable[Tensor], groups: int
) -> list[Moments]:
    """Measure the moments of a convolution or linear layer, one ``Moments`` per group of channels.

    Args:
        node: the layer's call, for its stride, padding and dilation.
        inputs: its INT8 inputs, one tensor per sample.
        outputs: its float outputs, one tensor per sample, with or without the bias, which changes neither H
            nor C.
        groups: of the convolution; 1 for a linear layer.
    """
    total: list[list[Tensor]] = []
    count = 0
    for x, y in zip(inputs, outputs, strict=True):
        parts = _sums(node, x, y, groups)
        count += y.numel() // y.shape[channel_axis(y)]
        total = (
            parts
            if not total
            else [[a + b for a, b in zip(p, q, strict=True)] for p, q in zip(total, parts, strict=True)]
        )
    moments = []
    for xx, yx, x_sum, y_sum in total:
        x, y = x_sum / count, y_sum / count
        moments.append(Moments(xx / count - torch.outer(x, x), yx / count - torch.outer(y, x), x, y))
    return moments


def _sums(node: fx.Node, x: Tensor, y: Tensor, groups: int) -> list[list[Tensor]]:
    """Return per group the sums of x x', y x', x and y over the output positions of one sample."""
    if node.target is torch.ops.aten.linear.default:
        columns, rows = x.reshape(-1, x.shape[-1]).t(), y.reshape(-1, y.shape[-1]).t()
    else:
        stride, padding, dilation = (_pair(value) for value in convolution_arguments(node)[:3])
        side = weight_shape(node)[2:]
        if groups == 1 and stride == (1, 1) and side != (1, 1):
            return [_sums_of_shifts(x, y, side, padding, dilation)]
        columns = F.unfold(x, side, dilation=dilation, padding=padding, stride=stride)
        columns, rows = columns.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1)
    pairs = zip(columns.chunk(groups), rows.chunk(groups), strict=True)
    return [_sums_around_means(a, b) for a, b in pairs]


def _sums_around_means(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the sums of x x', y x', x and y, for x (A, N) and y (B, N) that may be nearly constant.

    They are nearly constant behind a mask that is never active. The float32 rounding of products of the means
    would then exceed the spread. So the means are subtracted first, and their products are added in float64.
    """
    (off_x, p), (off_y, q) = ((z - z.mean(1, keepdim=True), z.mean(1).double()) for z in (x, y))
    x_sum, y_sum = (z.sum(1, dtype=torch.float64) for z in (x, y))
    count = x.shape[1]
    xx = _product(off_x, off_x) + (torch.outer(x_sum, p) + torch.outer(p, x_sum)) - count * torch.outer(p, p)
    yx = _product(off_y, off_x) + (torch.outer(y_sum, p) + torch.outer(q, x_sum)) - count * torch.outer(q, p)
    return [xx, yx, x_sum, y_sum]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b' for a (A, N) and b (B, N) over many positions: float64 sums of float32 stretches.

    In a single float32 sum over a photo, the rounding of the mean exceeds the spread.
    """
    count = a.shape[1] // _STRETCH
    whole = count * _STRETCH
    stretches = [x[:, :whole].reshape(len(x), count, _STRETCH).transpose(0, 1) for x in (a, b)]
    rest = a[:, whole:] @ b[:, whole:].t()
    return torch.bmm(stretches[0], stretches[1].transpose(1, 2)).sum(0, dtype=torch.float64) + rest


def _sums_of_shifts(
    x: Tensor, y: Tensor, side: tuple[int, ...], padding: tuple[int, int], dilation: tuple[int, int]
) -> list[Tensor]:
    """Return the sums of ``_sums`` for a dense layer of stride 1 without one copy of its input per tap.

    The products of two taps are those of x with x shifted by their distance: 13 shifts for the 45 pairs of
    3 x 3 taps. The few rows and columns at the border that a tap does not reach are subtracted. Rows and
    images lie one behind the other in memory with zeros between them, so that every shift is an offset and
    nothing is copied.
    """
    (down, across), (rows, columns) = padding, y.shape[2:]
    low, far = ((n - 1) * step for n, step in zip(side, dilation, strict=True))  # of the last tap
    height, width = rows + low, columns + far
    image = F.pad(x, (across, across + far, down, down + low)).transpose(0, 1).contiguous()
    flat, pitch = image.flatten(1), image.shape[3]
    taps = [(i * dilation[0], j * dilation[1]) for i in range(side[0]) for j in range(side[1])]

    def correlate(top: int, bottom: int, left: int, right: int, i: int, j: int) -> Tensor:
        one = image[:, :, top:bottom, left:right].flatten(1)
        other = image[:, :, top + i : bottom + i, left + j : right + j].flatten(1)
        return _product(one, other)

    everywhere: dict[tuple[int, int], Tensor] = {}
    xx = torch.zeros(len(image), len(taps), len(image), len(taps), dtype=torch.float64)
    for k, (i, j) in enumerate(taps):
        for m, (i_, j_) in enumerate(taps[k:], k):
            shift = (i_ - i, j_ - j)
            offset = shift[0] * pitch + shift[1]
            if shift not in everywhere:
                everywhere[shift] = _product(flat[:, : flat.shape[1] - offset], flat[:, offset:])
            product = everywhere[shift].clone()
            left, right = max(0, -shift[1]), width - max(0, shift[1])
            for strip in (
                (0, i, left, right),
                (i + rows, height - shift[0], left, right),
                (i, i + rows, left, j),
                (i, i + rows, j + columns, right),
            ):
                if strip[0] < strip[1] and strip[2] < strip[3]:
                    product -= correlate(*strip, *shift)
            xx[:, k, :, m], xx[:, m, :, k] = product, product.t()
    outputs = torch.cat([y, torch.ones_like(y[:, :1])], 1).transpose(0, 1)  # with ones for the sums of x
    spread = F.pad(outputs, (0, pitch - columns, 0, image.shape[2] - rows)).flatten(1)
    offsets = [i * pitch + j for i, j in taps]
    seen = torch.stack([_product(spread[:, : flat.shape[1] - n], flat[:, n:]) for n in offsets], 2).flatten(1)
    return [xx.flatten(2).flatten(0, 1), seen[:-1], seen[-1], y.sum((0, 2, 3), dtype=torch.float64)]


def _pair(value: Any) -> tuple[int, int]:
    a, b = (value, value) if isinstance(value, int) else (value * 2)[:2]
    return int(a), int(b)


def reconstruct(weight: Tensor, scales: Tensor, moments: list[Moments]) -> tuple[Tensor, Tensor] | None:
    """Round a weight so that its layer's outputs change least; return the quantized weight and the new bias.

    Args:
        weight: float weight, (O, I / groups, ...).
        scales: one per output channel, (O,).
        moments: one per group.

    Returns:
        Integers of the weight's shape in [-127, 127], and the bias (O,); both float64. None where the
        moments are not finite, or so ill-conditioned that the largest ridge does not help.
    """
    quantized, biases = [], []
    groups = len(moments)
    flat = weight.double().reshape(weight.shape[0], -1)
    for w, s, m in zip(flat.chunk(groups), scales.double().chunk(groups), moments, strict=True):
        q = _round_group(w, s, m)
        if q is None:
            return None
        quantized.append(q)
        biases.append(m.y - (q * s[:, None]) @ m.x)
    return torch.cat(quantized).reshape(weight.shape), torch.cat(biases)


def _round_group(w: Tensor, scales: Tensor, moments: Moments) -> Tensor | None:
    """Round the weights of one group; a ridge that leaves H indefinite is enlarged, step by step."""
    if not all(bool(x.isfinite().all()) for x in (moments.h, moments.c, moments.x, moments.y)):
        return None
    for enlarged in _RIDGES:
        h = _damped(moments, enlarged)
        try:
            q = _round_columns(_refit(w, moments, h), scales, h)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # indefinite or singular
            continue
        if q.isfinite().all():
            return q
    return None


def _refit(w: Tensor, moments: Moments, damped: Tensor) -> Tensor:
    """Return the weights nearest to w that compute the float outputs from the INT8 inputs."""
    change: Tensor = torch.linalg.solve(damped, (moments.c - w @ moments.h).t()).t()
    return w + change


def _damped(moments: Moments, enlarged: float) -> Tensor:
    """Return H with a ridge: a share of its mean diagonal, and more than float32's rounding of a constant."""
    spread, mean = moments.h.diagonal().mean(), (moments.x**2).mean()
    ridge = _DAMPING * spread + 16 * torch.finfo(torch.float32).eps * mean + 1e-30
    return moments.h + torch.eye(len(moments.h), dtype=moments.h.dtype) * (ridge * enlarged)


def _round_columns(w: Tensor, scales: Tensor, h: Tensor) -> Tensor:
    """Round column by column, the largest diagonal of H first; the remaining columns absorb each error."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, quantized = w[:, order].clone(), torch.empty_like(w)
    for begin in range(0, w.shape[1], _BLOCK):  # a block passes its errors on in one product
        end = min(begin + _BLOCK, w.shape[1])
        errors = torch.zeros(w.shape[0], end - begin, dtype=w.dtype)
        for i in range(begin, end):
            q = torch.clamp(torch.round(left[:, i] / scales), -127, 127)
            errors[:, i - begin] = error = (left[:, i] - q * scales) / factor[i, i]
            left[:, i:end] -= torch.outer(error, factor[i, i:end])
            quantized[:, order[i]] = q
        left[:, end:] -= errors @ factor[begin:end, end:]
    return quantized
