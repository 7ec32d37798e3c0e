"""Small slimmable layers and networks with weights of their own, for the tests of DDS-Net."""

from __future__ import annotations

import torch
from disturbed import disturb
from torch import nn

from edgedyn.layers.ddsnet.dsnet import DSNet
from edgedyn.layers.ddsnet.networks import GatedNetwork, ImageGate, SlimmableUnit, check_configurations

STEM, GATED = [[4, 6], 1, 3, 2], [[8, 12, 16, 20], 1, 3, 1, "ds", True]


def fresh(module: nn.Module) -> nn.Module:
    """Return it disturbed, in float64 and evaluation mode."""
    return disturb(module.double(), seed=5, spread=0.3).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def assert_equal(y: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


def make_net(choices=None, **arguments) -> DSNet:
    torch.manual_seed(3)
    choices = choices or [STEM, GATED, [[8, 12, 16, 24], 2, 3, 2, "ir", False], [[16]]]
    return fresh(DSNet(5, 3, choices, **arguments))


class Chain(nn.Module):
    """Two units and a 1x1 convolution."""

    def __init__(self, configurations):
        super().__init__()
        self.configurations = check_configurations(configurations, ["first", "second"], "Chain")
        first, second = zip(*configurations, strict=True)
        self.first = SlimmableUnit([[3] * len(first)], first, stride=2)
        self.second = SlimmableUnit([first], second)

    def forward(self, x, choice):
        return self.second(choice, self.first(choice, x))[:, :4]

    def static(self, choice):
        return nn.Sequential(self.first.static(choice), self.second.static(choice), FirstFour())


class FirstFour(nn.Module):
    def forward(self, x):
        return x[:, :4]


def make_gated(count: int = 3) -> GatedNetwork:
    torch.manual_seed(1)
    return fresh(GatedNetwork(ImageGate(count, features=8), Chain([(4, 6), (4, 8), (10, 8)])))
