"""ACDA (arXiv 2108.07895, ICCV 2021): kernels mixed at every pixel from a few Fourier-Bessel bases.

    alpha = bases_net(x)                                   Conv3x3 BN Tanh Conv3x3 BN Tanh
    D[b, m, t, p]      = sum_k alpha[b, m, k, p] * bases[k, t]
    Z[b, c * M + m, p] = sum_t D[b, m, t, p] * x[b, c, p * stride + off(t)]
    y = Conv1x1(Z, coef, bias)

x: (B, C, H, W)   alpha: (B, M, K, h, w)   bases: (K, T)   coef: (O, C * M, 1, 1)   y: (B, O, h, w)
M = num_bases kernels per pixel, the paper's atoms; K = M * (R // 2): M bases per radius 1 .. R // 2

The reference follows the published code, channel-major features and all, and loads its state_dicts. The
canonical module holds the same weights and calls ``edgedyn::atom_depthwise2d``, whose output is
kernel-major: the columns of ``coef`` are permuted once, so nothing is transposed at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers import Layer
from edgedyn.layers._adopt import require_outputs
from edgedyn.ops.atom_depthwise2d import atom_depthwise2d

MAX_BASES = 6  # as many functions as radius 1 has; every radius contributes the same number
_MAX_ORDER = 15  # angular frequencies among which the published code looks for zeros


def fourier_bessel(radius: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Compute the Fourier-Bessel functions on a grid of side 2 * radius + 1, lowest frequency first.

    On the disc of radius L + 1/2, with the zeros z of the Bessel function J_k:

        J_0(z r) / |J_1(z)|      sqrt(2) J_k(z r) / |J_(k+1)(z)| * {cos, sin}(k phi),  k > 0

    A zero is kept if its successor is at most pi * (L + 1/2) * f, with f = 2 for L = 1 and 1.5 otherwise. The
    functions are 0 outside the disc; the set is divided by the root mean square of their norms on the grid.

    Args:
        radius: L >= 1, pixels.

    Returns:
        (functions, (2 * radius + 1) ** 2), row-major: 6 functions for radius 1, 14 for 2, 38 for 3.
    """
    from scipy.special import jn_zeros, jv

    disc, taps = radius + 0.5, (2 * radius + 1) ** 2
    limit = math.pi * disc * (2 if radius == 1 else 1.5)
    enough = math.ceil(limit / math.pi) + 2  # the i-th zero of J_0 is near (i - 1/4) pi, of J_k beyond
    zeros = [jn_zeros(order, enough) for order in range(_MAX_ORDER + 1)]
    kept = sorted((z[i], k) for k, z in enumerate(zeros) for i in range(enough - 1) if z[i + 1] <= limit)
    yy, xx = np.mgrid[-radius : radius + 1, -radius : radius + 1] / disc
    r, angle = np.hypot(xx, yy).ravel(), np.arctan2(xx, yy).ravel()
    functions = []
    for zero, order in kept:
        radial = np.where(r < 1, jv(order, zero * r), 0) / abs(jv(order + 1, zero))
        waves = [np.cos(order * angle), np.sin(order * angle)] if order else [np.ones(taps)]
        functions += [math.sqrt(len(waves)) * radial * wave for wave in waves]
    found = np.stack(functions[: taps - 1])
    norms = np.square(found).sum(axis=1)
    return np.asarray(found / np.sqrt(norms.mean()))


def multi_scale_bases(kernel_size: int, num_bases: int) -> Tensor:
    """Stack the first ``num_bases`` functions of each radius 1 .. R // 2, zero-padded to R x R.

    Returns:
        (K, T) float32, K = num_bases * (R // 2), radius-major.
    """
    scales = []
    for radius in range(1, kernel_size // 2 + 1):
        side, margin = 2 * radius + 1, kernel_size // 2 - radius
        functions = torch.from_numpy(fourier_bessel(radius)[:num_bases]).float().view(-1, side, side)
        scales.append(F.pad(functions, (margin,) * 4).flatten(1))
    return torch.cat(scales)


class ACDAConv(nn.Module):
    """Adaptive convolution with per-pixel dynamic filter atoms; in place of a convolution.

    Args:
        in_channels: channels C of the input.
        out_channels: channels O of the output.
        kernel_size: odd kernel side R >= 3; the input is zero-padded by R // 2.
        stride: pixels between two output pixels; H and W must be divisible by it.
        num_bases: kernels M per pixel, 1 to 6; also the bases per radius.
        bias: whether the last 1x1 convolution has an offset.

    Raises:
        ModelError: for a kernel, stride or number of bases that the published code cannot build.
    """

    bases: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        num_bases: int = MAX_BASES,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(kernel_size, stride, num_bases)
        self.in_channels, self.out_channels, self.num_bases = in_channels, out_channels, num_bases
        self.kernel_size, self.stride = kernel_size, stride
        self.register_buffer("bases", multi_scale_bases(kernel_size, num_bases))
        coefficients = num_bases * len(self.bases)
        hidden = max(64, coefficients // 2)
        self.bases_net = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 3, stride, padding=1),
            nn.BatchNorm2d(hidden),
            nn.Tanh(),
            nn.Conv2d(hidden, coefficients, 3, padding=1),
            nn.BatchNorm2d(coefficients),
            nn.Tanh(),
        )
        self.coef = nn.Parameter(torch.empty(out_channels, in_channels * num_bases, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_normal_(self.coef, mode="fan_out", nonlinearity="relu")

    def coefficients(self, x: Tensor) -> Tensor:
        """Return alpha (B, M, K, h, w) in [-1, 1].

        Raises:
            ModelError: when H or W is not divisible by the stride.
        """
        _check_size(x, self.stride)
        alpha: Tensor = self.bases_net(x)
        return alpha.view(x.shape[0], self.num_bases, len(self.bases), *alpha.shape[2:])

    def features(self, x: Tensor, alpha: Tensor) -> Tensor:
        """Filter x with the M kernels that alpha mixes at every pixel: Z (B, C * M, h, w), channel-major."""
        patches = F.unfold(x, self.kernel_size, padding=self.kernel_size // 2, stride=self.stride)
        patches = patches.view(x.shape[0], x.shape[1], -1, *alpha.shape[3:])
        kernels = torch.einsum("bmkhw, kt -> bmthw", alpha, self.bases)
        return torch.einsum("bmthw, bcthw -> bcmhw", kernels, patches).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, O, H / stride, W / stride)."""
        return F.conv2d(self.features(x, self.coefficients(x)), self.coef, self.bias)


class CanonicalACDAConv(nn.Module):
    """ACDAConv on ``edgedyn::atom_depthwise2d``; the columns of ``coef`` are kernel-major."""

    bases: Tensor

    def __init__(self, layer: ACDAConv) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.bases_net = layer.kernel_size, layer.stride, layer.bases_net
        self.register_buffer("bases", layer.bases)
        columns = torch.arange(layer.coef.shape[1]).view(layer.in_channels, layer.num_bases).t().flatten()
        self.coef = nn.Conv2d(len(columns), layer.out_channels, 1, bias=layer.bias is not None)
        self.coef = self.coef.to(layer.coef.device, layer.coef.dtype)
        weights = {"weight": layer.coef.data[:, columns]}
        self.coef.load_state_dict(weights if layer.bias is None else {**weights, "bias": layer.bias.data})

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, O, H / stride, W / stride)."""
        _check_size(x, self.stride)
        z = atom_depthwise2d(x, self.bases_net(x), self.bases, self.kernel_size, self.stride)
        y: Tensor = self.coef(z)
        return y


def _check_arguments(kernel_size: int, stride: int, num_bases: int) -> None:
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ModelError(
            f"ACDAConv got kernel_size={kernel_size}; expected an odd number >= 3: the Fourier-Bessel bases "
            "need odd grids, and radius 0 has none. Use an ordinary convolution, or retrain."
        )
    if stride < 1:
        raise ModelError(f"ACDAConv got stride={stride}; expected a whole number of pixels >= 1.")
    if not 1 <= num_bases <= MAX_BASES:
        raise ModelError(
            f"ACDAConv got num_bases={num_bases}; expected 1 to {MAX_BASES}: radius 1 has {MAX_BASES} "
            "Fourier-Bessel functions, and every radius contributes as many bases. Retrain with fewer."
        )


def _check_size(x: Tensor, stride: int) -> None:
    if any(size % stride for size in x.shape[2:]):
        raise ModelError(
            f"ACDAConv got x {tuple(x.shape)} with stride={stride}; expected H and W divisible by the "
            "stride, as the published code needs. Choose another input shape, or pad the image."
        )


_SIZES = ("in_channels", "out_channels", "kernel_size")
# the optional arguments of the published class and their defaults
_OPTIONS: dict[str, Any] = {
    "inter_kernel_size": 5,
    "stride": 1,
    "padding": 0,
    "num_bases": MAX_BASES,
    "bias": True,
    "bases_grad": True,
    "dilation": 1,
    "groups": 1,
    "mode": "mode1",
    "bases_drop": None,
}


def _from_constructor(in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> ACDAConv:
    """Make our reference from the authors' constructor arguments; the defaults are theirs.

    ``mode``, ``bases_grad`` and ``bases_drop`` change no output of the published class: any value that it
    accepts is accepted.

    Raises:
        TypeError: for an argument that the published class does not have.
        ModelError: for arguments that the published class refuses, or accepts and ignores.
    """
    if unknown := sorted(options.keys() - _OPTIONS.keys()):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    options = _OPTIONS | options
    stride, num_bases, padding, mode = (options[k] for k in ("stride", "num_bases", "padding", "mode"))
    sizes = {"kernel_size": kernel_size, "stride": stride, "num_bases": num_bases}
    if wrong := {name: value for name, value in sizes.items() if not isinstance(value, int)}:
        raise ModelError(f"Conv_DCFD got {wrong}; the published class takes one whole number for each.")
    _check_arguments(kernel_size, stride, num_bases)
    for name in ("inter_kernel_size", "dilation", "groups"):
        value, expected = options[name], _OPTIONS[name]
        if value != expected:
            raise ModelError(
                f"Conv_DCFD got {name}={value!r}; expected {expected}. The published class accepts any value "
                "and ignores it, so the trained network was computed with "
                f"{name}={expected}. Pass that."
            )
    if padding not in (kernel_size // 2, (kernel_size // 2,) * 2, [kernel_size // 2] * 2):
        raise ModelError(
            f"Conv_DCFD got padding={padding!r} for kernel_size={kernel_size}; expected {kernel_size // 2}: "
            "the published class computes no other output size. Pass the padding it was trained with."
        )
    if mode not in ("mode0", "mode1"):
        raise ModelError(f"Conv_DCFD got mode={mode!r}; the published class knows 'mode0' and 'mode1'.")
    return ACDAConv(
        in_channels, out_channels, kernel_size, stride=stride, num_bases=num_bases, bias=bool(options["bias"])
    )


def _from_instance(layer: Any) -> ACDAConv | None:
    """Make our reference from an instance of a class named Conv_DCFD.

    Returns:
        None where it has no ``bases_net`` and so is no dynamic layer.

    Raises:
        ModelError: when attributes, modules, tensors or outputs are not those of the published class.
    """
    if not isinstance(layer._modules.get("bases_net"), nn.Module):
        return None
    names = {*_SIZES, *_OPTIONS} - {"bias"}
    found = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    if missing := sorted(names - found.keys()):
        raise ModelError(f"Conv_DCFD has no attribute {missing[0]!r}, the published class has. {_OTHER}")
    reference = _from_constructor(**found, bias=getattr(layer, "bias", None) is not None)
    expected, own = reference.state_dict(), layer.state_dict()
    for key in sorted(expected.keys() | own.keys()):
        if key not in own or key not in expected or own[key].shape != expected[key].shape:
            shapes = [tuple(state[key].shape) if key in state else None for state in (own, expected)]
            raise ModelError(f"Conv_DCFD has {key!r} of shape {shapes[0]}; expected {shapes[1]}. {_OTHER}")
    _adopt_structure(list(layer.bases_net.children()), reference.bases_net)
    reference.to(own["coef"].device, own["coef"].dtype).load_state_dict(own)
    require_outputs(reference.train(layer.training), layer)
    return reference


def _adopt_structure(theirs: list[Any], ours: nn.Sequential) -> None:
    """Check that a foreign bases_net has our layers and options, and copy its BatchNorm constants."""
    if [type(module) for module in theirs] != [type(module) for module in ours]:
        raise ModelError(f"Conv_DCFD has bases_net {theirs}; expected {list(ours)}. {_OTHER}")
    for found, expected in zip(theirs, ours, strict=True):
        if isinstance(expected, nn.BatchNorm2d):
            expected.eps, expected.momentum = found.eps, found.momentum
        elif str(found) != str(expected):
            raise ModelError(f"Conv_DCFD has {found} in bases_net; expected {expected}. {_OTHER}")


_OTHER = "This is another layer than that of arXiv 2108.07895; rename its class, or use edgedyn.layers.acda."


def _examples() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yield reference modules in evaluation mode, each with an input that discriminates (B >= 2, H != W)."""
    generator = torch.Generator().manual_seed(5)
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (ACDAConv(4, 6), (2, 4, 9, 13)),
        (ACDAConv(5, 3, 3, stride=2, num_bases=5, bias=False), (2, 5, 10, 14)),
        (ACDAConv(3, 4, 5, num_bases=4), (2, 3, 7, 11)),
        (ACDAConv(2, 5, 7, stride=3, num_bases=3), (2, 2, 9, 12)),
    ]
    for module, shape in cases:
        yield module.eval(), (torch.randn(shape, generator=generator),)


LAYER = Layer(
    name="acda",
    paper="ACDA (arXiv 2108.07895)",
    primitive="atom_depthwise2d",
    canonical={ACDAConv: CanonicalACDAConv},
    examples=_examples,
    authors={"Conv_DCFD": lambda arguments, state_dict: _from_constructor(**arguments)},
    recognise={"Conv_DCFD": _from_instance},
)
