"""Small networks outside the five papers, each around one thing that runtimes or quantization get wrong.

A user's networks are like these: a map with several readers, pads of any rank and sign, norms without
statistics, channels of very different sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 8


def conv(inputs: int, outputs: int, side: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2)


class Residual(nn.Module):
    """x minus what the layers make of x."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


class Involution(nn.Module):
    """A kernel per pixel, applied to unfolded patches."""

    def __init__(self, channels: int, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.reduce = nn.Sequential(conv(channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.span = conv(4, 9 * groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernels = self.span(self.reduce(x)).view(b, self.groups, 1, 9, h, w)
        patches = F.unfold(x, 3, padding=1).view(b, self.groups, c // self.groups, 9, h, w)
        return (kernels * patches).sum(3).view(b, c, h, w)


def involution() -> nn.Module:
    return Residual(conv(3, C), nn.ReLU(), Involution(C), nn.ReLU(), conv(C, 3))


class Readers(nn.Module):
    """One map per function, which the function and a convolution read."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions
        self.head, self.tail = conv(3, C), conv(C, 3)
        self.maps = nn.ModuleList(conv(C, C) for _ in functions)
        self.readers = nn.ModuleList(conv(C, C) for _ in functions)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        for function, make, read in zip(self.functions, self.maps, self.readers, strict=True):
            y = make(y)
            y = function(y) + read(y)
        return x - self.tail(y)


class Only(nn.Module):
    """A map that a function alone reads."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions
        self.convolutions = nn.ModuleList(conv(C, C) for _ in functions)
        self.head, self.tail = conv(3, C), conv(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        for function, layer in zip(self.functions, self.convolutions, strict=True):
            y = layer(function(y))
        return x - self.tail(y)


def _fold(y: Tensor) -> Tensor:
    return F.fold(F.unfold(y, 4, padding=1, stride=2), y.shape[2:], 4, padding=1, stride=2) / 4


def _pad_volume(y: Tensor) -> Tensor:
    return F.pad(y[None], (1, 1, 1, 1, 1, 1), value=-0.25)[0, :, 1:-1, 1:-1, 1:-1]


READERS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "logarithms": (F.softplus, F.mish, F.logsigmoid, lambda y: torch.log(y.abs() + 1)),
    "error functions": (torch.erf, F.gelu, torch.sin, torch.atan, F.elu),
    "powers": (lambda y: y**3, lambda y: (y * y + 1).rsqrt(), lambda y: F.normalize(y, dim=1)),
    "running sums": (lambda y: torch.cumsum(y, 1) / C, lambda y: y / (y.std((2, 3), keepdim=True) + 1)),
    "choices": (
        lambda y: torch.gather(y, 1, torch.zeros_like(y, dtype=torch.long)),
        lambda y: y * y.max(1, keepdim=True)[0],
        lambda y: torch.where(y > 0, y, y * 0.1),
        F.softshrink,
    ),
    "orders": (
        lambda y: y[:, [3, 2, 1, 0, 7, 6, 5, 4]],
        lambda y: torch.roll(y, (1, 1), (2, 3)),
        lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2),
        lambda y: torch.softmax(y, 1),
    ),
    "pads": (
        lambda y: F.pad(y, (1, 1, 1, 1), value=0.5)[:, :, 2:, 2:],
        lambda y: F.pad(y, (-1, 1, 2, -2), value=0.3),
        lambda y: F.pad(y, (-1, -1, 0, 0)).repeat(1, 1, 1, 2)[..., : y.shape[3]],
        lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect")[:, :, 2:, 2:],
        _pad_volume,
    ),
    "patches": (lambda y: F.unfold(y, 3, padding=1).view(1, C, 9, *y.shape[2:]).mean(2), _fold),
}
