"""Both definitions: three convolutions in float, and the same with every map rounded to INT8."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError
from edgedyn.ops.inverted_residual.block import NAMES, Block, check, check_mask_values

Step = Callable[[Tensor], Tensor]
_INT8 = "inverted_residual_int8"


class Affine(NamedTuple):
    """INT8 quantization of one activation: real = (stored - zero_point) * scale."""

    scale: float
    zero_point: int

    def store(self, x: Tensor) -> Tensor:
        """Return x as ``quantize_per_tensor`` stores it, integers in the type of x; NaN stays NaN."""
        return ((x * (1 / self.scale)).round() + self.zero_point).clamp(-128, 127)

    def real(self, stored: Tensor) -> Tensor:
        """Return the value of each stored integer."""
        return (stored - self.zero_point) * self.scale

    def round(self, x: Tensor) -> Tensor:
        """Return x as it comes back from INT8."""
        return self.real(self.store(x))


def expand_and_filter(x: Tensor, block: Block, of_hidden: Step, of_filtered: Step) -> Tensor:
    """Return the filtered map (B, E, h, w), as ``of_filtered`` leaves it."""
    hidden = of_hidden(block.expand.activate(F.conv2d(x, block.expand.weight, block.expand.bias)))
    weight, bias = block.depthwise.weight, block.depthwise.bias
    # the hidden map is padded, not x; a padded 0 is multiplied: 0 * inf is NaN
    padded = F.pad(hidden, (weight.shape[2] // 2,) * 4)
    filtered = F.conv2d(padded, weight, bias, block.stride, groups=len(weight))
    return of_filtered(block.depthwise.activate(filtered))


def finish(filtered: Tensor, x: Tensor, block: Block) -> Tensor:
    """Project, mask and add x: y of the filtered map."""
    y = block.project.activate(F.conv2d(filtered, block.project.weight, block.project.bias))
    # not a product: an infinity where the mask is 0 leaves no NaN
    y = y if block.mask is None else torch.where(block.mask != 0, y, torch.zeros_like(y))
    return x + y if block.residual else y


def oracle(x: Tensor, *rest: Any) -> Tensor:
    """Compute the op by its definition: three convolutions."""
    block = Block.read(rest[:10], rest[10:])
    check(x, block)
    check_mask_values(block.mask)
    return finish(expand_and_filter(x, block, lambda y: y, lambda y: y), x, block)


def fake(x: Tensor, *rest: Any) -> Tensor:
    """Make the checks of ``oracle``; return an empty tensor of its shape."""
    block = Block.read(rest[:10], rest[10:])
    check(x, block)
    return x.new_empty(block.output(x))


class Int8Call(NamedTuple):
    """The arguments of the INT8 op behind x.

    Attributes:
        block: weights as real values, in the type of x.
        of_x: quantization of x.
        of_hidden: of the expanded and activated map.
        of_filtered: of the filtered and activated map.
    """

    block: Block
    of_x: Affine
    of_hidden: Affine
    of_filtered: Affine

    @classmethod
    def read(cls, x: Tensor, *rest: Any) -> Int8Call:
        """Read and check the flat arguments.

        Raises:
            ModelError: for shapes, types or ranges that the op does not take.
        """
        affines, tensors, scales = [], [], {}
        for k, name in enumerate(NAMES):
            scale, zero_point, weight, scales[name], bias, slopes = rest[6 * k : 6 * k + 6]
            affines.append(Affine(scale, zero_point))
            tensors += [weight, bias, slopes]
        stored = Block.read((*tensors, rest[18]), rest[19:])
        check(x, stored, _INT8, torch.int8)
        _check_quantization(x, stored, affines, scales)
        real = [
            of._replace(weight=of.weight.to(x.dtype) * scales[name].to(x.dtype).reshape(-1, 1, 1, 1))
            for name, of in stored.convolutions
        ]
        return cls(Block._make((*real, *stored[len(NAMES) :])), *affines)


def oracle_int8(x: Tensor, *rest: Any) -> Tensor:
    """Compute the INT8 op by its definition: x, hidden and filtered map rounded to INT8, all else float."""
    call = Int8Call.read(x, *rest)
    check_mask_values(call.block.mask, _INT8)
    _check_weight_values(rest)
    seen = call.of_x.round(x)
    filtered = expand_and_filter(seen, call.block, call.of_hidden.round, call.of_filtered.round)
    return finish(filtered, x, call.block)


def _check_weight_values(rest: tuple[Any, ...]) -> None:
    for k, name in enumerate(NAMES):
        if (rest[6 * k + 2] == -128).any():  # NEON adds two products in 16 bits
            raise ModelError(
                f"{_INT8} got {name} with a value of -128; expected -127 to 127. Quantize symmetrically."
            )


def fake_int8(x: Tensor, *rest: Any) -> Tensor:
    """Make the checks of ``oracle_int8``; return an empty tensor of its shape."""
    return x.new_empty(Int8Call.read(x, *rest).block.output(x))


def _check_quantization(x: Tensor, block: Block, affines: list[Affine], scales: dict[str, Tensor]) -> None:
    for name, (scale, zero_point) in zip(("x", "hidden", "filtered"), affines, strict=True):
        if not 0 < scale < math.inf or not -128 <= zero_point <= 127:
            raise ModelError(
                f"{_INT8} got {name}_scale={scale}, {name}_zero_point={zero_point}; expected a scale > 0 "
                "and a zero point in [-128, 127]. Calibrate the activation again."
            )
    for name, of in block.convolutions:
        if scales[name].shape != of.bias.shape or scales[name].dtype != x.dtype:
            raise ModelError(
                f"{_INT8} got {name}_scales {tuple(scales[name].shape)} of {scales[name].dtype}; expected "
                f"{tuple(of.bias.shape)} of {x.dtype}, one per output channel. Quantize weights per channel."
            )
