"""Convolution evaluated only where a mask is set; zero elsewhere, bias included.

    y[b, o, p] = a(bias[o] + sum_{t, i} weight[o, i, t] * x[b, g(o) + i, s p + d off(t)])   where mask is 1
    y[b, o, p] = 0                                                                          where mask is 0

x: (B, I, H, W)   weight: (O, I / groups, R, R)   bias: (O,) or None   mask: (B, 1, h, w)   y: (B, O, h, w)
s stride, d dilation, g(o) the first channel of o's group, a activation, T = R * R taps

The activation belongs to the op: a runtime fuses it into the convolution, and the 8-bit range then need not
cover the values that it clips.

The mask has the output's resolution: a float of 0 or 1 per position, in the type of x, because every runtime
multiplies floats and few multiply booleans.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError
from edgedyn.ops import Op, register
from edgedyn.ops.masked_conv2d.forms import ACTIVATIONS, FORMS

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor mask, int stride=1, int padding=0, int dilation=1,"
    " int groups=1, str activation='none') -> Tensor"
)


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Compute the op by its definition: gather the active positions, multiply, scatter the rows."""
    size = _check(x, weight, bias, mask, stride, padding, dilation, groups, activation)
    if not ((mask == 0) | (mask == 1)).all():
        raise ModelError(
            f"masked_conv2d got a mask with values from {mask.min().item()} to {mask.max().item()}; expected "
            "0 and 1 only. Decide first: logits >= 0."
        )
    sample, row, column = mask[:, 0].nonzero(as_tuple=True)
    padded, side = F.pad(x, (padding,) * 4), weight.shape[2]
    y = x.new_zeros(len(sample), weight.shape[0])
    for tap in range(side**2):
        dy, dx = dilation * (tap // side), dilation * (tap % side)
        values = padded[sample, :, row * stride + dy, column * stride + dx].chunk(groups, dim=1)
        kernels = weight[:, :, tap // side, tap % side].chunk(groups)
        y = y + torch.cat([v @ k.t() for v, k in zip(values, kernels, strict=True)], dim=1)
    out = x.new_zeros(x.shape[0], weight.shape[0], *size)
    out[sample, :, row, column] = ACTIVATIONS[activation](y if bias is None else y + bias)
    return out


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    size = _check(x, weight, bias, mask, stride, padding, dilation, groups, activation)
    return x.new_empty(x.shape[0], weight.shape[0], *size)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    activation: str,
) -> tuple[int, int]:
    """Return the output's height and width."""
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"masked_conv2d got activation={activation!r}; expected one of {', '.join(ACTIVATIONS)}. Apply "
            "another one behind the op, where it keeps 0."
        )
    if min(stride, dilation, groups) < 1 or padding < 0:
        raise ModelError(
            f"masked_conv2d got stride={stride}, padding={padding}, dilation={dilation}, groups={groups}; "
            "expected padding >= 0 and the others >= 1. Fix the layer's arguments."
        )
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ModelError(
            f"masked_conv2d got x {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (B, I, H, W) "
            "and (O, I / groups, R, R). Pad an oblong kernel with zeros to a square."
        )
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ModelError(
            f"masked_conv2d got x of {x.shape[1]} channels, weight {tuple(weight.shape)} groups={groups}; "
            "expected I / groups channels per kernel, and groups to divide O. Fix groups or the weight."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ModelError(
            f"masked_conv2d got bias {tuple(bias.shape)}; expected {(weight.shape[0],)}: one value per "
            "output channel."
        )
    reach = dilation * (weight.shape[2] - 1) + 1
    height, width = ((extent + 2 * padding - reach) // stride + 1 for extent in x.shape[2:])
    if min(height, width) < 1 or tuple(mask.shape) != (x.shape[0], 1, height, width):
        raise ModelError(
            f"masked_conv2d got mask {tuple(mask.shape)} for x {tuple(x.shape)}; expected "
            f"{(x.shape[0], 1, height, width)}: one value per position of the output, at least one position. "
            "Give the mask the resolution of the convolution's output."
        )
    if mask.dtype != x.dtype:
        raise ModelError(
            f"masked_conv2d got a mask of {mask.dtype} for x of {x.dtype}; expected the same type. Cast the "
            "mask to the type of x."
        )
    return height, width


_OVERLOAD = register("masked_conv2d", _SCHEMA, oracle, _fake)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve x where the mask is set (arXiv 1912.03203, sec. 3.1); one graph node.

    Args:
        x: (B, I, H, W), zero-padded.
        weight: (O, I / groups, R, R).
        bias: (O,), added where the mask is set, or None.
        mask: (B, 1, h, w) of 0 and 1 in the type of x, at the output's resolution.
        stride: distance between output positions, input pixels.
        padding: zeros at each border, pixels.
        dilation: distance between taps, pixels.
        groups: blocks of channels that do not mix; I for a depthwise convolution.
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        (B, O, h, w), the dtype of x; 0 where the mask is 0.

    Raises:
        ModelError: for options out of range, or shapes or types that do not fit together; where the op
            computes (not in a trace), also for a mask with other values than 0 and 1.
    """
    return torch.ops.edgedyn.masked_conv2d(  # type: ignore[no-any-return]
        x, weight, bias, mask, stride, padding, dilation, groups, activation
    )


def _examples() -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor, int, int, int, int, str]]:
    """Yield the op's arguments in order: odd sizes, stride 2, depthwise, groups, dilation, empty and full."""
    generator = torch.Generator().manual_seed(19)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def mask(*shape: int, density: float = 0.4) -> Tensor:
        return (torch.rand(shape, generator=generator) < density).float()

    yield rand(2, 5, 17, 23), rand(7, 5, 3, 3), rand(7), mask(2, 1, 17, 23), 1, 1, 1, 1, "none"
    yield rand(3, 6, 13, 18), rand(8, 6, 3, 3), None, mask(3, 1, 7, 9), 2, 1, 1, 1, "relu"
    yield rand(2, 4, 9, 14), rand(6, 4, 1, 1), rand(6), mask(2, 1, 9, 14), 1, 0, 1, 1, "none"
    yield rand(2, 6, 11, 8), rand(6, 1, 3, 3), rand(6), mask(2, 1, 11, 8), 1, 1, 1, 6, "relu6"
    yield rand(2, 6, 12, 15), rand(4, 3, 5, 5), rand(4), mask(2, 1, 6, 8), 2, 4, 2, 2, "none"
    full, empty = torch.ones(1, 1, 5, 7), torch.zeros(1, 1, 5, 7)
    yield (
        rand(3, 3, 5, 7),
        rand(2, 3, 3, 3),
        rand(2),
        torch.cat([full, empty, mask(1, 1, 5, 7)]),
        1,
        1,
        1,
        1,
        "none",
    )


def _apply_macs(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *rest: int, **options: object
) -> int:
    """Count the convolution at every position, as for a full mask."""
    return mask.numel() * weight.numel()


OP = Op(
    name="masked_conv2d",
    overload=_OVERLOAD,
    forms=FORMS,
    examples=_examples,
    generated=("mask",),
    apply_macs=_apply_macs,
)
