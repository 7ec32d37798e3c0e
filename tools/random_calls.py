"""Calls of each op with random shapes, options and values: the same for the same seed and index.

Extents are drawn evenly on a logarithmic scale, so that 1 is as likely as the sizes at which kernels cut
their work (strips, bands, blocks of channels); about one call of sixteen has an empty batch, one of four an
infinity or a NaN.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from block_check import is_block
from op_calls import OPS, OpCall, to_int8
from torch import Tensor

from edgedyn.ops import Op

_MOST = 2_000_000  # multiply-adds of a call: the oracle is slow


class Draw:
    """Random numbers of one call."""

    def __init__(self, *seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def extent(self, most: int) -> int:
        """Return 1 to ``most``, each factor of two as likely as the next."""
        return int(np.exp(self.generator.uniform(0, np.log(most + 1))))

    def one_of(self, *values: Any) -> Any:
        """Return one of the values."""
        return values[self.generator.integers(len(values))]

    def batch(self) -> int:
        """Return 0 to 4."""
        return self.one_of(0, *[1] * 8, *[2] * 5, 3, 4)

    def tensor(self, *shape: int) -> Tensor:
        """Return normal values."""
        return torch.from_numpy(self.generator.standard_normal(shape, np.float32))

    def mask(self, *shape: int) -> Tensor:
        """Return zeros and ones: none, few, some, half, all, or a single position."""
        density = self.one_of(0, 0.02, 0.2, 0.5, 1, None)
        if density is not None:
            return torch.from_numpy((self.generator.random(shape) < density).astype(np.float32))
        single = torch.zeros(shape)
        if single.numel():
            single.flatten()[int(self.generator.integers(single.numel()))] = 1
        return single


def _sliced(d: Draw) -> tuple[Any, ...]:
    b, side, filters = d.batch(), d.one_of(1, 3, 3, 3, 5, 7), d.extent(5)
    channels, h, w = filters * d.extent(5), d.extent(200), d.extent(400)
    cells, taps = (d.extent(24), d.extent(24)), side * side
    offset = d.tensor(b, filters, *cells) if d.one_of(True, False) else None
    dilation = d.one_of(1, 1, 2, 3)
    grid = d.tensor(b, taps * filters, *cells)
    return d.tensor(b, channels, h, w), grid, offset, side, dilation, d.one_of(True, False)


def _decoupled(d: Draw) -> tuple[Any, ...]:
    b, side, heads = d.batch(), d.one_of(1, 3, 3, 3, 5, 7), d.extent(4)
    channels, stride, taps = heads * d.extent(70), d.one_of(1, 1, 2, 2, 3, 4), side * side
    h, w = stride - 1 + d.extent(60), stride - 1 + d.extent(300)
    x, channel = d.tensor(b, channels, h, w), d.tensor(b, taps * channels, 1, 1)
    spatial = d.tensor(b, taps * heads, h // stride, w // stride)
    return x, channel, spatial, side, stride, d.one_of(1, 1, 2, 3, 6), heads, d.one_of("mul", "add")


def _atoms(d: Draw) -> tuple[Any, ...]:
    b, side, bases = d.batch(), d.one_of(1, 3, 3, 3, 5, 7), d.extent(9)
    kernels, stride = d.extent(14), d.one_of(1, 1, 2, 2, 3, 5)
    h, w = d.extent(60), d.extent(400)
    alpha = d.tensor(b, kernels * bases, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return d.tensor(b, d.extent(12), h, w), alpha, d.tensor(bases, side * side), side, stride


def _masked(d: Draw) -> tuple[Any, ...]:
    b, side, groups = (
        d.batch(),
        d.one_of(1, 1, 2, 3, 3, 3, 4, 5),
        d.one_of(1, 1, 1, d.extent(4), d.extent(40)),
    )
    is_depthwise = d.one_of(True, False) and groups > 1
    depth, outputs = 1 if is_depthwise else d.extent(60), groups * d.extent(3 if groups > 4 else 150)
    stride, dilation = d.one_of(1, 1, 1, 2, 3), d.one_of(1, 1, 1, 2, 3)
    reach = (side - 1) * dilation + 1
    padding = d.one_of(reach // 2, reach // 2, 0, reach, reach + 2)
    least = max(1, reach - 2 * padding)
    h, w = least - 1 + d.extent(90), least - 1 + d.extent(300)
    size = tuple((n + 2 * padding - reach) // stride + 1 for n in (h, w))
    mask = d.mask(b, 1, *size)
    bias = d.tensor(outputs) if d.one_of(True, False) else None
    weight = d.tensor(outputs, depth, side, side)
    x, activation = d.tensor(b, groups * depth, h, w), d.one_of("none", "relu", "relu6")
    return x, weight, bias, mask, stride, padding, dilation, groups, activation


def _inverted(d: Draw) -> tuple[Any, ...]:
    b, side, stride = d.batch(), d.one_of(3, 3, 5), d.one_of(1, 1, 2)
    channels, hidden, residual = d.extent(48), d.extent(320), stride == 1 and d.one_of(True, False)
    outputs, h, w = channels if residual else d.extent(48), d.one_of(1, d.extent(60)), d.extent(200)
    size = (b, 1, (h - 1) // stride + 1, (w - 1) // stride + 1)
    activations = [d.one_of("none", "relu", "relu6", "prelu", "hardswish") for _ in range(3)]
    tensors: list[Tensor | None] = []
    weights = (hidden, channels, 1, 1), (hidden, 1, side, side), (outputs, hidden, 1, 1)
    for shape, activation in zip(weights, activations, strict=True):
        slopes = d.tensor(shape[0]) * d.one_of(0.2, 0.2, 1) if activation == "prelu" else None
        tensors += [d.tensor(*shape), d.tensor(shape[0]), slopes]
    mask = d.mask(*size) if d.one_of(True, False) else None
    return d.tensor(b, channels, h, w), *tensors, mask, *activations, stride, residual


DRAWS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "sliced_depthwise2d": _sliced,
    "decoupled_depthwise2d": _decoupled,
    "atom_depthwise2d": _atoms,
    "masked_conv2d": _masked,
    "inverted_residual": _inverted,
}


def random_call(name: str, seed: int, index: int) -> OpCall:
    """Return the call of this number, float32 where the number is even and INT8 where it is odd."""
    op, draw = OPS[name], Draw(seed, zlib.crc32(name.encode()), index)
    while op.apply_macs(*(args := DRAWS[name](draw))) > _MOST:
        pass
    if draw.generator.random() < 0.25:
        _spoil(draw, _may_be_spoiled(op, args, is_int8=bool(index % 2)))
    call = OpCall(op, args, shift=4 * int(draw.one_of(0, 0, 1, 3)))
    if index % 2 == 0:
        return call
    zero_points = draw.one_of((-128, 127), (127, -128), (0, 0), (11, -50), (-7, 3))
    quantized = to_int8(call, zero_points, draw.one_of(30, 90, 400))
    return replace(quantized, shift=int(draw.one_of(0, 0, 1, 3, 5)) * 4)


def _may_be_spoiled(op: Op, args: tuple[Any, ...], *, is_int8: bool) -> list[Tensor]:
    """Return the tensors that may hold an infinity or a NaN: none that is INT8, and no mask."""
    named = zip((argument.name for argument in op.overload._schema.arguments), args, strict=True)
    tensors = {name: a for name, a in named if isinstance(a, Tensor) and name != "mask"}
    if is_int8:
        tensors = {"x": tensors["x"]} if is_block(op) else {n: a for n, a in tensors.items() if n != "x"}
    return list(tensors.values())


def _spoil(draw: Draw, tensors: list[Tensor]) -> None:
    """Put up to three values that are not finite, or too small to be normal, into one tensor."""
    values = draw.one_of(*tensors).flatten()
    for _ in range(draw.extent(3) if len(values) else 0):
        values[int(draw.generator.integers(len(values)))] = draw.one_of(np.nan, np.inf, -np.inf, 1e-42)


def describe(call: OpCall) -> str:
    """Return the call in one line: shapes and options."""
    shown = [tuple(a.shape) if isinstance(a, Tensor) else a for a in call.args]
    kind = "int8" if call.is_int8 else "float32"
    return f"{call.op.name} {kind}{tuple(shown)} {call.shift} bytes behind a line"
