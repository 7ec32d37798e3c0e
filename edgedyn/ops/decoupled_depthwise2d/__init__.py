"""Depthwise filtering; the kernel at (channel, pixel) combines a channel filter and a spatial filter.

    y[b, c, p] = sum_t (channel_filter[b, t * C + c] o spatial_filter[b, t * G + c // share, p])
                       * x[b, c, p * stride + off(t)]                               o is * or +

x: (B, C, H, W)   channel_filter: (B, T * C, 1, 1)   spatial_filter: (B, T * G, h, w)   y: (B, C, h, w)
G heads, share = C // G, T = R * R taps, h = H // stride, w = W // stride

Zero padding, odd R. Both filters are tap-major, so that every form reads a tap with one channel slice. An odd
H or W at stride 2 leaves its last row or column without an output of its own, as in the published operator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError
from edgedyn.ops import Op, register
from edgedyn.ops.decoupled_depthwise2d.forms import FORMS

_SCHEMA = (
    "(Tensor x, Tensor channel_filter, Tensor spatial_filter, int kernel_size, int stride=1, int dilation=1,"
    ' int heads=1, str combine="mul") -> Tensor'
)


def oracle(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
) -> Tensor:
    """Compute the op by its definition; slow, it materialises every kernel."""
    _check(x, channel_filter, spatial_filter, kernel_size, stride, dilation, heads, combine)
    channels, (h, w) = x.shape[1], spatial_filter.shape[2:]
    padded = F.pad(x, (dilation * (kernel_size // 2),) * 4)
    y = x.new_zeros(x.shape[0], channels, h, w)
    for tap in range(kernel_size**2):
        channel = channel_filter[:, tap * channels : (tap + 1) * channels]
        spatial = spatial_filter[:, tap * heads : (tap + 1) * heads]
        spatial = spatial.repeat_interleave(channels // heads, dim=1)
        kernel = channel * spatial if combine == "mul" else channel + spatial
        dy, dx = dilation * (tap // kernel_size), dilation * (tap % kernel_size)
        rows, columns = slice(dy, dy + stride * h, stride), slice(dx, dx + stride * w, stride)
        y = y + kernel * padded[:, :, rows, columns]
    return y


def _fake(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
) -> Tensor:
    _check(x, channel_filter, spatial_filter, kernel_size, stride, dilation, heads, combine)
    return x.new_empty((*x.shape[:2], *spatial_filter.shape[2:]))


def _check(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    heads: int,
    combine: str,
) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0 or dilation < 1 or stride < 1:
        raise ModelError(
            f"decoupled_depthwise2d got kernel_size={kernel_size}, stride={stride}, dilation={dilation}; "
            "expected an odd kernel_size >= 1, stride >= 1 and dilation >= 1. Even kernels have no centre "
            "pixel: retrain with an odd one."
        )
    if combine not in ("mul", "add"):
        raise ModelError(
            f"decoupled_depthwise2d got combine={combine!r}; expected 'mul' or 'add', the two published "
            "combinations. Pass one of them."
        )
    if x.dim() != 4:
        raise ModelError(
            f"decoupled_depthwise2d got x {tuple(x.shape)}; expected (B, C, H, W). Add the missing axis."
        )
    b, c, height, width = x.shape
    if heads < 1 or c % heads:
        raise ModelError(
            f"decoupled_depthwise2d got heads={heads} for {c} channels; expected a divisor of the channels, "
            "which are shared out in consecutive runs. Choose another number of heads."
        )
    if channel_filter.shape != (b, kernel_size**2 * c, 1, 1):
        raise ModelError(
            f"decoupled_depthwise2d got channel_filter {tuple(channel_filter.shape)}; expected "
            f"{(b, kernel_size**2 * c, 1, 1)} for x {tuple(x.shape)}: (B, T * C, 1, 1), "
            "tap-major. Reshape it."
        )
    expected = (b, kernel_size**2 * heads, height // stride, width // stride)
    if spatial_filter.shape != expected or 0 in expected[2:]:
        raise ModelError(
            f"decoupled_depthwise2d got spatial_filter {tuple(spatial_filter.shape)}; expected {expected} "
            f"for x {tuple(x.shape)}: (B, T * G, H // stride, W // stride), tap-major, not empty. Generate "
            "it at that size."
        )


_OVERLOAD = register("decoupled_depthwise2d", _SCHEMA, oracle, _fake)


def decoupled_depthwise2d(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
) -> Tensor:
    """Filter x with the decoupled dynamic filter (arXiv 2104.14107, eq. 2); one graph node.

    Args:
        x: (B, C, H, W).
        channel_filter: (B, T * C, 1, 1), tap-major, taps row-major; index ``t * C + c``.
        spatial_filter: (B, T * G, H // stride, W // stride), tap-major; index ``t * G + g``. Head g serves
            the consecutive channels ``[g * C / G, (g + 1) * C / G)``.
        kernel_size: odd R, T = R * R.
        stride: distance between output pixels, pixels of x.
        dilation: distance between taps, pixels of x.
        heads: number G of spatial filters.
        combine: ``mul`` or ``add``, how the two filters combine to a kernel.

    Returns:
        (B, C, H // stride, W // stride), the dtype of x.

    Raises:
        ModelError: for options out of range, or shapes that do not fit together.
    """
    return torch.ops.edgedyn.decoupled_depthwise2d(  # type: ignore[no-any-return]
        x, channel_filter, spatial_filter, kernel_size, stride, dilation, heads, combine
    )


def _examples() -> Iterator[tuple[Tensor, Tensor, Tensor, int, int, int, int, str]]:
    """Yield the op's arguments in order: odd sizes, strides, heads, dilations, both combinations."""
    generator = torch.Generator().manual_seed(9)
    cases = [  # B, C, H, W, R, stride, dilation, heads, combine
        (2, 6, 17, 23, 3, 1, 1, 1, "mul"),
        (2, 5, 11, 14, 3, 1, 1, 1, "add"),
        (2, 6, 13, 18, 3, 2, 1, 2, "mul"),
        (3, 8, 14, 9, 5, 2, 1, 4, "add"),
        (2, 4, 12, 19, 5, 1, 2, 2, "mul"),
        (2, 3, 16, 22, 3, 2, 2, 3, "add"),
        (2, 4, 20, 15, 5, 3, 2, 1, "mul"),
        (2, 4, 5, 8, 1, 2, 1, 2, "add"),
        (2, 2, 2, 4, 3, 2, 3, 1, "mul"),
    ]
    for b, c, height, width, r, stride, dilation, heads, combine in cases:
        shapes = (
            (b, c, height, width),
            (b, r * r * c, 1, 1),
            (b, r * r * heads, height // stride, width // stride),
        )
        x, channel, spatial = (torch.randn(shape, generator=generator) for shape in shapes)
        yield x, channel, spatial, r, stride, dilation, heads, combine


def _apply_macs(
    x: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    kernel_size: int,
    *rest: object,
    **options: object,
) -> int:
    """Count 2 per tap and element: one combines the filters, one applies the kernel."""
    b, c = x.shape[:2]
    h, w = spatial_filter.shape[2:]
    return 2 * b * c * h * w * kernel_size**2


OP = Op(
    name="decoupled_depthwise2d",
    overload=_OVERLOAD,
    forms=FORMS,
    examples=_examples,
    generated=("channel_filter", "spatial_filter"),
    apply_macs=_apply_macs,
)
