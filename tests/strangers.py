"""Networks of strangers: each is built around one thing that real networks have and ours do not."""

from __future__ import annotations

import sys

from torch import Tensor, nn

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
