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


def norm_between(norm: nn.Module) -> nn.Module:
    """Return a network with a layer that normalises C channels; norms get statistics and factors."""
    return with_statistics(Residual(conv(3, C), norm, nn.ReLU(), conv(C, 3)))


def with_statistics(net: nn.Module) -> nn.Module:
    """Give every norm of a network statistics and factors of its own."""
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


class Reshaped(nn.Module):
    """Layers on a feature map that a function reshapes."""

    def __init__(self, reshape: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.reshape, self.layers = reshape, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.reshape(x)).reshape(x.shape)


class LayerNorm2d(nn.Module):
    """Normalises the channels of every pixel, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(C, 1, 1) + 0.5), nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        off = x - x.mean(1, keepdim=True)
        return self.weight * off / (off.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() + self.bias


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(C, C), conv(C, C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


class SharedOutput(nn.Module):
    """A convolution that a BatchNorm reads, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv(C, C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(y) + y


class LinearNorm(nn.Module):
    """A linear layer with BatchNorm that weighs the channels."""

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C), nn.BatchNorm1d(C, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm(self.linear(x.mean((2, 3)))).sigmoid()[:, :, None, None]


class TiedNorm(nn.Module):
    """A linear layer with BatchNorm, and a product with the weight of that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        tied = torch.mm(self.linear.weight, mean.t()).t()
        return x * (self.norm(self.linear(mean)) + tied).sigmoid()[:, :, None, None]


class Upsampled(nn.Module):
    """A transposed convolution with BatchNorm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(C, C, 2, 2, groups=groups)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.norm(self.up(x)), 2)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(2)


def _volume(x: Tensor) -> Tensor:
    return x[:, :, None]


_UNTRACKED = {"track_running_stats": False}
# each norm, and whether it takes its statistics from each image
NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "batch": (lambda: nn.BatchNorm2d(C), False),
    "batch, untracked": (lambda: nn.BatchNorm2d(C, **_UNTRACKED), True),
    "batch, untracked, not affine": (lambda: nn.BatchNorm2d(C, affine=False, **_UNTRACKED), True),
    "batch, not affine": (lambda: nn.BatchNorm2d(C, affine=False), False),
    "instance": (lambda: nn.InstanceNorm2d(C), True),
    "instance, affine": (lambda: nn.InstanceNorm2d(C, affine=True), True),
    "instance, tracked": (lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), False),
    "group": (lambda: nn.GroupNorm(4, C), True),
    "layer": (LayerNorm2d, True),
    "batch 1d": (lambda: Reshaped(_rows, nn.BatchNorm1d(C)), False),
    "batch 1d, untracked": (lambda: Reshaped(_rows, nn.BatchNorm1d(C, **_UNTRACKED)), True),
    "batch 3d": (lambda: Reshaped(_volume, nn.BatchNorm3d(C)), False),
    "batch 3d, untracked": (lambda: Reshaped(_volume, nn.BatchNorm3d(C, **_UNTRACKED)), True),
    "convolution 1d": (lambda: Reshaped(_rows, nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C)), False),
    "convolution 1d, untracked": (
        lambda: Reshaped(_rows, nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C, **_UNTRACKED)),
        True,
    ),
    "shared norm": (SharedNorm, False),
    "shared output": (SharedOutput, False),
    "linear": (LinearNorm, False),
    "linear, not affine": (lambda: LinearNorm(affine=False), False),
    "linear, tied": (TiedNorm, False),
    "transposed": (Upsampled, False),
    "transposed, grouped": (lambda: Upsampled(groups=2), False),
}


def shifted_features() -> nn.Module:
    """Return a network whose first feature map has a large mean."""
    net = Residual(conv(3, C), nn.ReLU(), conv(C, C), nn.ReLU(), conv(C, C), nn.ReLU(), conv(C, 3))
    with torch.no_grad():
        net.body[0].bias += 50
    return net


def scaled_channel(factor: float, *between: nn.Module, channel: int = 5) -> nn.Module:
    """Return a network with one channel ``factor`` times as large, which its reader divides again."""
    net = Residual(conv(3, C), nn.ReLU(), conv(C, C), *(between or (nn.ReLU(),)), conv(C, 3))
    with torch.no_grad():
        net.body[2].weight[channel] *= factor
        net.body[2].bias[channel] *= factor
        net.body[-1].weight[:, channel] /= factor
    return net
