"""Bounds for a kernel's error against its op's definition, and calls to check it; for tests and GPUs.

The definition is the op's oracle in float64, on the same values that the kernel reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import block_check
import torch
import torch.nn.functional as F
from block_check import UNIT, is_block
from torch import Tensor

from edgedyn.ops import Op

TYPES = ("float32", "float16", "int8")


def to_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


def with_defaults(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Append the schema's default arguments."""
    return (*args, *(a.default_value for a in op.overload._schema.arguments[len(args) :]))


def rounding(op: Op, args: tuple[Any, ...]) -> Tensor:
    """Return the largest error of float32 against the exact result, at every output.

    A sum of n float32 terms, each a product of a few factors, is off by at most (n + roundings per term)
    * 2^-24 * sum |terms|, in any order of summation (Higham, Accuracy and Stability, section 3.1).
    """
    if is_block(op):
        return block_check.rounding(args)
    # infinities and NaN add nothing to an output that is finite
    x, *rest = (a.double().nan_to_num(0, 0, 0).abs() if isinstance(a, Tensor) else a for a in args)
    rest = ["none" if a in ("relu", "relu6") else a for a in rest]  # an activation would hide terms
    if op.name == "sliced_depthwise2d":
        # 1 - weight is off by as much as weight: each cell counts whole, whatever its weight
        rest[:2] = [a if a is None or not a.numel() else F.max_pool2d(a, 3, 1, 1) for a in rest[:2]]
    return (_terms(op.name, args) + 16) * UNIT * op.overload(x, *rest) + 1e-37  # type: ignore[no-any-return]


def _terms(name: str, args: tuple[Any, ...]) -> int:
    """Return the number of terms in the sum of one output, sums within terms included."""
    if name == "masked_conv2d":
        return args[1][0].numel() + 1
    taps = args[3] ** 2
    return taps + (args[2].shape[0] if name == "atom_depthwise2d" else 0)


def int8_call(
    op: Op, args: tuple[Any, ...], zero_points: tuple[int, int] = (11, -50)
) -> tuple[Any, tuple[Any, ...]]:
    """Return the INT8 variant of an op and its arguments: scales of these values, zero points off centre."""
    of_x, of_y = zero_points
    variant = getattr(torch.ops.edgedyn, f"{op.name}_int8").default
    if is_block(op):
        return variant, block_check.int8_args(with_defaults(op, args), zero_points)
    x, *rest = with_defaults(op, args)
    # an empty tensor, or one of zeros, still has a scale
    x_scale, y = float(x.abs().amax()) / 100 if x.numel() else 1.0, op.overload(*args)
    y_scale = float(y.abs().amax()) / 90 if y.numel() else 1.0  # some values saturate behind the zero point
    x_scale, y_scale = x_scale or 1.0, y_scale or 1.0
    stored = ((x / x_scale).round() + of_x).clamp(-128, 127).to(torch.int8)
    return variant, (stored, x_scale, of_x, *rest, y_scale, of_y)


def exact_int8(op: Op, args: tuple[Any, ...]) -> Tensor:
    """Return y of the INT8 variant before it is rounded: in quantization steps, saturated."""
    *_, scale, zero_point = args
    real = op.overload((args[0].double() - args[2]) * args[1], *to_double(args[3:-2]))
    return (real / scale + zero_point).clamp(-128, 127)


# 0.5 is a tie; float32 is off by some 1e-4 of a step in values of up to 256 steps
INT8_LIMIT = 0.5 + 1e-3


def int8_bounds(op: Op, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest y that a kernel of the INT8 variant may give, at every output."""
    if is_block(op):
        return block_check.int8_bounds(args)
    exact = exact_int8(op, args)
    return exact - INT8_LIMIT, exact + INT8_LIMIT


class Case(NamedTuple):
    """A call of a CUDA kernel and its exact result.

    Attributes:
        dtype: type of x and y.
        inputs: tensors as they are stored, None for an absent one.
        attributes: the other arguments.
        of_x: scale and zero point of x.
        of_y: scale and zero point of y.
        exact: y in float64; of INT8, in quantization steps.
        limit: largest error of y.
    """

    dtype: str
    inputs: tuple[Tensor | None, ...]
    attributes: tuple[Any, ...]
    of_x: tuple[float, int]
    of_y: tuple[float, int]
    exact: Tensor
    limit: Tensor


def make_case(op: Op, args: tuple[Any, ...], dtype: str) -> Case:
    """Return a call of an op's kernel with arguments of these values."""
    args = with_defaults(op, args)
    of_x = of_y = (1.0, 0)
    if dtype == "int8":
        _, int8_args = int8_call(op, args)
        stored, of_x, of_y = (int8_args[0], *int8_args[3:-2]), int8_args[1:3], int8_args[-2:]
        exact = exact_int8(op, int8_args)
        limit = torch.full_like(exact, INT8_LIMIT)
    else:
        stored = tuple(a.to(getattr(torch, dtype)) if isinstance(a, Tensor) else a for a in args)
        exact = op.overload(*to_double(stored))
        limit = rounding(op, stored)
        if dtype == "float16":  # the result's own rounding: half an ulp, relative 2^-10, or 2^-24 at least
            limit = limit + exact.abs() * 2**-11 + 2**-25
    tensors = sum("Tensor" in str(a.type) for a in op.overload._schema.arguments)
    return Case(dtype, stored[:tensors], stored[tensors:], of_x, of_y, exact, limit)


def random_calls(op: Op, count: int, seed: int = 3) -> Iterator[tuple[Any, ...]]:
    """Yield arguments of random shapes: sizes of 1, rows with and without a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for _ in range(count):
        x = rand(
            pick(1, 2), pick(1, 2, 4, 6, 70), pick(1, 2, 5, 9, 18, 40), pick(1, 3, 7, 16, 32, 45, 136, 272)
        )
        yield _CALLS[op.name](x, pick, rand)


def _call_sliced(x: Tensor, pick: Any, rand: Any) -> tuple[Any, ...]:
    b, channels = x.shape[:2]
    filters = pick(*(n for n in (1, 2, channels) if channels % n == 0))
    side, cells = pick(1, 3, 3, 3, 5), (pick(1, 2, 5, 30), pick(1, 3, 8, 50))
    offset = rand(b, filters, *cells) if pick(True, False) else None
    return x, rand(b, side**2 * filters, *cells), offset, side, pick(1, 1, 1, 2), pick(True, False)


def _call_decoupled(x: Tensor, pick: Any, rand: Any) -> tuple[Any, ...]:
    b, channels, height, width = x.shape
    stride = pick(*(n for n in (1, 1, 2, 3) if n <= min(height, width)))
    side, heads = pick(1, 3, 3, 3, 5), pick(*(n for n in (1, 2, channels) if channels % n == 0))
    spatial = rand(b, side**2 * heads, height // stride, width // stride)
    filters = rand(b, side**2 * channels, 1, 1), spatial
    return x, *filters, side, stride, pick(1, 1, 2, 4), heads, pick("mul", "add")


def _call_atom(x: Tensor, pick: Any, rand: Any) -> tuple[Any, ...]:
    b, _, height, width = x.shape
    side, stride, kernels, bases = pick(1, 3, 3, 3, 5), pick(1, 1, 2, 3), pick(1, 2, 6, 9), pick(1, 3, 6)
    alpha = rand(b, kernels * bases, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return x, alpha, rand(bases, side**2), side, stride


def _call_masked(x: Tensor, pick: Any, rand: Any) -> tuple[Any, ...]:
    if x.shape[1] > 6:
        x = x[:, :, :9, :45].contiguous()  # all channels meet all outputs
    b, channels, height, width = x.shape
    side, stride, dilation = pick(1, 3, 3, 5), pick(1, 1, 2), pick(1, 1, 2)
    padding = pick(dilation * (side // 2), dilation * (side // 2), dilation * (side - 1))
    # many channels in one group: more than a kernel gathers at a time
    shared = (1, 1) if channels > 6 else tuple(n for n in (2, 3) if channels % n == 0)
    groups = pick(1, channels, channels, *shared)
    outputs = groups * pick(1, 1, 2, 70 // groups)
    reach = dilation * (side - 1) + 1
    size = [(n + 2 * padding - reach) // stride + 1 for n in (height, width)]
    mask = (rand(b, 1, *size) > pick(-9.0, 0.0, 1.0, 9.0)).float()
    bias = rand(outputs) if pick(True, False) else None
    weight = rand(outputs, channels // groups, side, side)
    return x, weight, bias, mask, stride, padding, dilation, groups, pick("none", "relu", "relu6")


_CALLS = {
    "sliced_depthwise2d": _call_sliced,
    "decoupled_depthwise2d": _call_decoupled,
    "atom_depthwise2d": _call_atom,
    "masked_conv2d": _call_masked,
}
