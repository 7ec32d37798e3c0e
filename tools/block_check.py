"""Bounds for a kernel's error against inverted_residual and inverted_residual_int8: three sums in a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn import ops
from edgedyn.ops.inverted_residual.block import Block, Convolution
from edgedyn.ops.inverted_residual.definition import Affine, Int8Call, expand_and_filter

UNIT = 2.0**-24  # half the distance between 1 and the next float32
# distance from a tie, in quantization steps, within which a kernel may round a hidden value either way
TIE = 1e-3


def is_block(op: ops.Op) -> bool:
    """Tell whether an op is ``inverted_residual``, whose bounds and INT8 variant are its own."""
    return op.name == "inverted_residual"


class _Sum(NamedTuple):
    """One convolution of magnitudes, without activation."""

    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    of: Convolution

    def of_values(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.of.weight, self.of.bias)

    def of_magnitudes(self, x: Tensor) -> Tensor:
        return self.convolve(x, _size(self.of.weight), _size(self.of.bias))

    def of_errors(self, error: Tensor) -> Tensor:
        return self.convolve(error, _size(self.of.weight), None)


def _size(x: Tensor) -> Tensor:
    """Return magnitudes; infinities and NaN add nothing to an output that is finite."""
    return x.nan_to_num(0, 0, 0).abs()


def _sums(block: Block) -> tuple[_Sum, _Sum, _Sum]:
    side, groups = block.depthwise.weight.shape[2], len(block.depthwise.weight)

    def filter_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (side // 2,) * 4), weight, bias, block.stride, groups=groups)

    return _Sum(F.conv2d, block.expand), _Sum(filter_map, block.depthwise), _Sum(F.conv2d, block.project)


def _slope(of: Convolution) -> Tensor | float:
    """Return the largest slope of an activation: the factor by which it can enlarge an error."""
    if of.activation == "hardswish":
        return 1.5  # at 3
    return 1.0 if of.slopes is None else _size(of.slopes).clamp(min=1).reshape(1, -1, 1, 1)


def rounding(args: tuple[Any, ...]) -> Tensor:
    """Return the largest error of float32 against the exact result, at every output.

    A sum of n float32 terms is off by at most (n + 1) * 2^-24 * sum |terms| in any order (Higham, Accuracy
    and Stability, section 3.1). Each of the three adds this, of the values that it reads, to the error that
    they bring; an activation multiplies an error by its slope at most, and rounds a few times itself.
    """
    x, *rest = (a.double() if isinstance(a, Tensor) else a for a in args)
    block = Block.read(tuple(rest[:10]), tuple(rest[10:]))
    value, error = x, torch.zeros_like(x)
    for convolution in _sums(block):
        of = convolution.of
        terms = of.weight[0].numel() + 8  # bias, rounding of double to float32, activation
        error = convolution.of_errors(error) + terms * UNIT * convolution.of_magnitudes(_size(value))
        error = _slope(of) * error
        value = of.activate(convolution.of_values(value))
    if block.mask is not None:
        error = error * block.mask
    if block.residual:
        error = error + 2 * UNIT * (_size(x) + _size(value) + error)
    return error * (1 + 1e-4) + 1e-37  # products of errors


def int8_args(
    args: tuple[Any, ...], zero_points: tuple[int, int] = (11, -50), steps: float = 90
) -> tuple[Any, ...]:
    """Return the arguments of the INT8 op for a float call with all arguments.

    Scales are of these values: x reaches 100 quantization steps, both hidden maps ``steps``, and some of
    their values saturate behind the zero point.
    """
    x, *rest = args
    block = Block.read(tuple(rest[:10]), tuple(rest[10:]))
    maps: list[Tensor] = []
    expand_and_filter(x, block, lambda y: maps.append(y) or y, lambda y: maps.append(y) or y)
    affines = [Affine(_scale(x, 100), zero_points[0])]
    affines += [Affine(_scale(y, steps), zero) for y, zero in zip(maps, reversed(zero_points), strict=True)]
    flat: list[Any] = [x]
    for affine, (_, of) in zip(affines, block.convolutions, strict=True):
        scales = _size(of.weight).amax((1, 2, 3)) / 127
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        stored = (of.weight.nan_to_num(0, 0, 0) / scales.reshape(-1, 1, 1, 1)).round()
        flat += [*affine, stored.to(torch.int8), scales, of.bias, of.slopes]
    return (*flat, block.mask, *(of.activation for _, of in block.convolutions), *block[4:])


def _scale(x: Tensor, steps: float) -> float:
    largest = float(_size(x).amax()) if x.numel() else 0.0
    return largest / steps or 1.0  # an empty tensor, or one of zeros, still has a scale


def int8_bounds(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest y that a kernel of the INT8 op may give, at every output.

    x is rounded as the definition rounds it, in float32. A value of the hidden or the filtered map may come
    out on either side of a tie that it is ``TIE`` steps away from; intervals carry this through the later
    sums. Elsewhere the two bounds are apart by the roundings of the last sum, which is float32. NaN where the
    definition has NaN, which has no INT8.
    """
    x, *rest = args
    call = Int8Call.read(x, *rest)
    block = call.block
    double = [Convolution(*(_to_double(t) for t in of[:3]), of.activation) for _, of in block.convolutions]
    block = Block._make((*double, *(_to_double(v) for v in block[3:])))
    expand, depthwise, project = _sums(block)
    seen = (call.of_x.store(x).double() - call.of_x.zero_point) * call.of_x.scale
    low, high = seen, seen
    for convolution, affine in ((expand, call.of_hidden), (depthwise, call.of_filtered)):
        low, high = _activate(convolution.of, *_apart(convolution, low, high))
        low = affine.round(low - TIE * affine.scale)
        high = affine.round(high + TIE * affine.scale)
    size = project.of_magnitudes(torch.maximum(_size(low), _size(high)))
    slack = _slope(project.of) * (project.of.weight[0].numel() + 8) * UNIT * size
    low, high = _activate(project.of, *_apart(project, low, high))
    return _finish(low - slack, x.double(), block, -1), _finish(high + slack, x.double(), block, 1)


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _apart(convolution: _Sum, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest sum of values between two maps."""
    weight, bias = convolution.of.weight, convolution.of.bias
    middle, half = (low + high) / 2, (high - low) / 2
    sums = convolution.convolve(middle, weight, bias)
    spread = convolution.convolve(half, weight.abs(), None)
    return sums - spread, sums + spread


def _activate(of: Convolution, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest result of an activation between two values."""
    turn = {"hardswish": -1.5}.get(of.activation, 0.0)  # where it may turn; a PReLU of negative slope at 0
    between = torch.minimum(torch.maximum(low, torch.full_like(low, turn)), high)
    results = torch.stack([of.activate(y) for y in (low, between, high)])
    return results.amin(0), results.amax(0)


def _finish(y: Tensor, x: Tensor, block: Block, sign: int) -> Tensor:
    if block.mask is not None:
        y = torch.where(block.mask != 0, y, torch.zeros_like(y))
    if not block.residual:
        return y
    return x + y + sign * 2 * UNIT * (_size(x) + _size(y))
