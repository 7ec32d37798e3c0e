"""Networks of strangers: each is built around one thing that real networks have and ours do not."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

C = 8


def conv(inputs: int, outputs: int, side: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, **options)


class Residual(nn.Module):
    """x minus a chain of layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


def around(layer: nn.Module) -> nn.Module:
    """Return a denoiser of one layer, C to C channels, between two convolutions."""
    return Residual(conv(3, C), nn.ReLU(), layer, nn.ReLU(), conv(C, 3))


# factories that make no network


def raises() -> nn.Module:
    raise RuntimeError("my config is missing")


def not_a_module() -> int:
    return 7


def needs_a_width(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 1)


def exits() -> nn.Module:
    print("usage: train.py DATA")
    sys.exit(2)


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def opens_a_file() -> nn.Module:
    import json

    return json.loads("{")


made = nn.Identity()


class RaisesLater(nn.Module):
    """A network that can be made and not called."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("sigma")


def raises_later() -> nn.Module:
    return RaisesLater()


# weights that are computed from parameters alone


class Doubled(nn.Module):
    """A parametrization of a user."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight - weight.mean()


class Noisy(nn.Module):
    """A parametrization that draws random numbers."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def parametrized(layer: nn.Module, parametrization: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


def hooked(layer: nn.Conv2d) -> nn.Conv2d:
    """Return a layer whose weight a hook of the user computes, as torch's old ones do."""
    weight = layer.weight
    del layer._parameters["weight"]
    layer.register_parameter("raw", nn.Parameter(weight.data))
    layer.weight = layer.raw * 2

    def double(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.weight = module.raw * 2

    layer.register_forward_pre_hook(double)
    return layer


def pruned(layer: nn.Conv2d) -> nn.Conv2d:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return prune.random_unstructured(layer, "bias", amount=0.5)


NORMED = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(conv(C, C)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(conv(C, C)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(conv(C, C)),
    "custom": lambda: parametrized(conv(C, C), Doubled()),
    "two": lambda: parametrized(nn.utils.parametrizations.weight_norm(conv(C, C)), Doubled()),
    "weight_norm_hook": lambda: nn.utils.weight_norm(conv(C, C)),
    "spectral_norm_hook": lambda: nn.utils.spectral_norm(conv(C, C)),
    "pruned": lambda: pruned(conv(C, C)),
}


def normed(kind: str) -> nn.Module:
    return around(NORMED[kind]())
