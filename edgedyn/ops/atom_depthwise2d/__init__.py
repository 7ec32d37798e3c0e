"""Depthwise filtering; the kernels of every pixel are mixtures of a few fixed bases.

    k[b, m, t, p]          = sum_k alpha[b, m * K + k, p] * bases[k, t]
    y[b, m * C + c, p]     = sum_t k[b, m, t, p] * x[b, c, p * stride + off(t)]

x: (B, C, H, W)   alpha: (B, M * K, h, w)   bases: (K, T)   y: (B, M * C, h, w)
M kernels per pixel, shared by all channels   T = R * R taps, row-major   h = ceil(H / stride), w likewise

Zero padding R // 2, odd R. The output is kernel-major, index m * C + c, so that every form makes the C
channels of a kernel at once and joins them with one concatenation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError
from edgedyn.ops import Op, register
from edgedyn.ops.atom_depthwise2d.forms import FORMS

_SCHEMA = "(Tensor x, Tensor alpha, Tensor bases, int kernel_size, int stride=1) -> Tensor"


def oracle(x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Compute the op by its definition; slow, it materialises every kernel."""
    _check(x, alpha, bases, kernel_size, stride)
    (b, c, height, width), (h, w) = x.shape, alpha.shape[2:]
    mix = alpha.reshape(b, alpha.shape[1] // len(bases), len(bases), h, w)
    kernels = torch.einsum("bmkhw, kt -> bmthw", mix, bases)
    padded = F.pad(x, (kernel_size // 2,) * 4)
    y = x.new_zeros(b, kernels.shape[1], c, h, w)
    for tap in range(kernel_size**2):
        dy, dx = tap // kernel_size, tap % kernel_size
        shifted = padded[:, :, dy : dy + height : stride, dx : dx + width : stride]
        y = y + kernels[:, :, tap, None] * shifted[:, None]
    return y.flatten(1, 2)


def _fake(x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    _check(x, alpha, bases, kernel_size, stride)
    kernels = alpha.shape[1] // bases.shape[0]
    return x.new_empty(x.shape[0], kernels * x.shape[1], *alpha.shape[2:])


def _check(x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0 or stride < 1:
        raise ModelError(
            f"atom_depthwise2d got kernel_size={kernel_size}, stride={stride}; expected an odd kernel_size "
            ">= 1 and stride >= 1. Even kernels have no centre pixel: retrain with an odd one."
        )
    if x.dim() != 4 or alpha.dim() != 4 or x.shape[0] != alpha.shape[0]:
        raise ModelError(
            f"atom_depthwise2d got x {tuple(x.shape)} and alpha {tuple(alpha.shape)}; expected (B, C, H, W) "
            "and (B, M * K, h, w) of the same batch B. Reshape alpha kernel-major."
        )
    if bases.dim() != 2 or bases.shape[0] < 1 or bases.shape[1] != kernel_size**2:
        raise ModelError(
            f"atom_depthwise2d got bases {tuple(bases.shape)}; expected (K, {kernel_size**2}): one row per "
            f"basis, its {kernel_size} x {kernel_size} taps row-major. Flatten each basis."
        )
    if alpha.shape[1] < 1 or alpha.shape[1] % bases.shape[0]:
        raise ModelError(
            f"atom_depthwise2d got alpha of {alpha.shape[1]} channels for {bases.shape[0]} bases; expected "
            "M * K channels, the K coefficients of a kernel side by side."
        )
    size = tuple((n - 1) // stride + 1 for n in x.shape[2:])
    if tuple(alpha.shape[2:]) != size:
        raise ModelError(
            f"atom_depthwise2d got alpha of {tuple(alpha.shape[2:])} pixels for x of {tuple(x.shape[2:])} "
            f"and stride={stride}; expected {size}: one kernel per output pixel."
        )


_OVERLOAD = register("atom_depthwise2d", _SCHEMA, oracle, _fake)


def atom_depthwise2d(x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Filter x with M kernels per pixel, mixed from fixed bases (arXiv 2108.07895, sec. 3); one graph node.

    Args:
        x: (B, C, H, W), zero-padded by R // 2.
        alpha: (B, M * K, h, w), index ``m * K + k``; h = ceil(H / stride), w likewise.
        bases: (K, T), taps row-major; a constant of the deployed program.
        kernel_size: odd R, T = R * R.
        stride: pixels between two output pixels.

    Returns:
        (B, M * C, h, w), index ``m * C + c``, the dtype of x.

    Raises:
        ModelError: for numbers out of range, or shapes that do not fit together.
    """
    return torch.ops.edgedyn.atom_depthwise2d(x, alpha, bases, kernel_size, stride)  # type: ignore[no-any-return]


def _examples() -> Iterator[tuple[Tensor, Tensor, Tensor, int, int]]:
    """Yield the op's arguments in order: odd sizes, strides 2 and 3, R = 1 to 7, one kernel, one basis."""
    generator = torch.Generator().manual_seed(9)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield rand(2, 4, 11, 17), rand(2, 3 * 6, 11, 17), rand(6, 9), 3, 1
    yield rand(2, 5, 12, 18), rand(2, 2 * 6, 6, 9), rand(6, 9), 3, 2
    yield rand(3, 3, 13, 10), rand(3, 2 * 4, 7, 5), rand(4, 25), 5, 2
    yield rand(2, 2, 9, 14), rand(2, 3 * 3, 3, 5), rand(3, 49), 7, 3
    yield rand(2, 3, 6, 8), rand(2, 4, 6, 8), rand(1, 9), 3, 1
    yield rand(2, 1, 5, 7), rand(2, 5, 5, 7), rand(5, 1), 1, 1
    yield rand(2, 3, 2, 3), rand(2, 2 * 2, 2, 3), rand(2, 25), 5, 1


def _apply_macs(
    x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int = 1, **options: object
) -> int:
    """Count the cheaper order per pixel: bases first, C * K * T + C * M * K, or M * K * T + C * M * T."""
    b, channels, (count, taps) = alpha.shape[0], x.shape[1], bases.shape
    kernels = alpha.shape[1] // count
    bases_first = channels * count * (taps + kernels)
    atoms_first = kernels * taps * (count + channels)
    return int(b * alpha.shape[2] * alpha.shape[3] * min(bases_first, atoms_first))


OP = Op(
    name="atom_depthwise2d",
    overload=_OVERLOAD,
    forms=FORMS,
    examples=_examples,
    generated=("alpha",),
    apply_macs=_apply_macs,
)
