"""DDS-Net (arXiv 2110.08940): a gate picks one of K configurations of a slimmable network for each image.

    logits = gate(x)        y = network(x, argmax(logits))

There is no op: the canonical counterpart is a routed program, a router and K ordinary networks, each with the
prefix of the weights and the BatchNorm statistics of its own width. ``slimmable``: layers of which a
configuration uses a prefix. ``gates``: they decide. ``networks``: both together. ``blocks`` and ``dsnet``:
DS-Net (arXiv 2103.13258), the same group's published code. ``authors``: references from the authors'
checkpoints and instances. This file: ``LAYER``, and the routed program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers import Layer
from edgedyn.layers._routed import RoutedModel
from edgedyn.layers.ddsnet.authors import BUILD, RECOGNISE
from edgedyn.layers.ddsnet.dsnet import DSNet
from edgedyn.layers.ddsnet.gates import ChannelAttention, GatedAttention
from edgedyn.layers.ddsnet.networks import Configurations, GatedNetwork, ImageGate, SlimmableUnit
from edgedyn.layers.ddsnet.slimmable import SlimmableConv2d


def route_gated_network(model: GatedNetwork) -> RoutedModel:
    """Make a routed program: the gate, and one ordinary network per configuration."""
    _refuse_hooks(model)
    network: Any = model.network
    variants = {f"w{k}": network.static(k) for k in range(len(network.configurations))}
    return RoutedModel(model.gate, variants)


def route_dsnet(model: DSNet) -> RoutedModel:
    """Make a routed program: trunk with gate, and one ordinary network per configuration behind it."""
    _refuse_hooks(model)
    router = model.router()
    return RoutedModel(router, {f"w{k}": model.tail(k) for k in range(len(model.configurations))})


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"{path or 'the model'} ({type(module).__name__}) carries forward hooks, which a routed "
                "program cannot call. Remove them before building."
            )


def _examples() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yield gated networks in evaluation mode whose inputs are routed to different configurations."""
    generator = torch.Generator().manual_seed(3)
    stages: list[list[Any]] = [
        [[6, 8], 1, 3, 2],
        [[8, 12], 2, 3, 1, "ds", False],
        [[8, 12, 16], 2, 3, 2, "ir", True],
    ]
    tail: list[list[Any]] = [[[12, 20, 24], 2, 3, 1, "ds", False], [[20]]]
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (GatedNetwork(ImageGate(3, features=8), _Chain(((4, 6), (4, 8), (10, 8)))), (4, 3, 11, 14)),
        (DSNet(5, 3, [*stages, *tail], act_layer="swish", se_ratio=1.0, gate_outputs=3), (4, 3, 18, 21)),
    ]
    for module, shape in cases:
        for p in module.parameters():
            p.data = float(p.dim() == 1) + 0.5 * torch.randn(p.shape, generator=generator)
        colors = 4 * torch.randn((4, 3, 1, 1), generator=generator)
        yield module.eval(), (colors + torch.randn(shape, generator=generator),)


class _Chain(nn.Module):
    """The smallest slimmable network: two units and a 1x1 convolution; an example."""

    def __init__(self, configurations: Configurations) -> None:
        super().__init__()
        self.configurations = configurations
        first, second = zip(*configurations, strict=True)
        self.first = SlimmableUnit([[3] * len(first)], first, stride=2)
        self.second = SlimmableUnit([first], second)
        self.last = SlimmableConv2d(sorted(set(second)), 2, 1)

    def forward(self, x: Tensor, choice: int) -> Tensor:
        y: Tensor = self.last(self.second(choice, self.first(choice, x)), 2)
        return y

    def static(self, choice: int) -> nn.Module:
        last = self.last.static(self.configurations[choice][1], 2)
        return nn.Sequential(self.first.static(choice), self.second.static(choice), last)


LAYER = Layer(
    name="ddsnet",
    paper="DDS-Net (arXiv 2110.08940)",
    primitive="routed program",
    canonical={GatedNetwork: route_gated_network, DSNet: route_dsnet},
    examples=_examples,
    authors=BUILD,
    recognise=RECOGNISE,
    float32=(ChannelAttention, GatedAttention, ImageGate),
)
