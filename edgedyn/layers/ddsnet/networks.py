"""A slimmable network of K configurations, and the gate that picks one for each sample (arXiv 2110.08940).

    logits = gate(x)        y = network(x, argmax(logits))

x, y: (B, C, H, W), or y (B, classes)   logits: (B, K)

A configuration is a vector of channel numbers, one per slimmable layer: not one ratio for all. Each contains
the one before it, so that every weight is a prefix. Deployed, a configuration is an ordinary network with the
weights of its own width, the gate stays in float32, and the host picks by argmax. No noise is added to the
logits, and no channels are computed at full width and masked, as the authors' evaluation does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, SlimmableJoin2d

Configurations = tuple[tuple[int, ...], ...]


class SlimmableNetwork(Protocol):
    """A network of K configurations, from cheap to expensive, of which a gate picks one.

    ``configurations`` holds the vector of channel numbers of each, ``forward(*features, choice)`` runs number
    ``choice`` on the features that the gate returns (by default the image), and ``static(choice)`` is the
    ordinary network of that configuration, in evaluation mode, with weights of its own.
    """

    configurations: Configurations

    def __call__(self, *inputs: Any) -> Tensor:
        """Run ``(*features, choice)``."""

    def static(self, choice: int) -> nn.Module:
        """Return the ordinary network of one configuration."""


def check_configurations(
    configurations: Sequence[Sequence[int]], layers: Sequence[str], owner: str
) -> Configurations:
    """Check the K configurations of a network, from cheap to expensive, and return them as tuples.

    Args:
        configurations: K vectors of channel numbers, one number per slimmable layer; the last is the full
            width.
        layers: names of the slimmable layers, in the order of a vector.
        owner: the network, for the message.

    Raises:
        ModelError: for fewer than 2, a vector of another length, a number below 1, or a configuration that
            does not contain the one before it and more.
    """
    found = tuple(tuple(vector) for vector in configurations)
    if len(found) < 2:
        raise ModelError(
            f"{owner} got {len(found)} configurations; expected at least 2, from cheap to expensive. Add "
            "one, or deploy an ordinary network."
        )
    for k, vector in enumerate(found):
        if len(vector) != len(layers) or any(type(width) is not int or width < 1 for width in vector):
            raise ModelError(
                f"{owner} got configuration {k} {list(vector)}; expected {len(layers)} positive whole "
                f"channel numbers, one for each of {', '.join(layers)}. Fix this configuration."
            )
    for k, (narrow, wide) in enumerate(itertools.pairwise(found)):
        lost = [name for name, a, b in zip(layers, narrow, wide, strict=True) if b < a]
        if lost or narrow == wide:
            raise ModelError(
                f"{owner} got configurations {k} and {k + 1}, {list(narrow)} and {list(wide)}, which are not "
                f"increasing ({f'{lost[0]} gets narrower' if lost else 'they are equal'}); expected each to "
                "hold the one before it and more. Sort them from cheap to expensive."
            )
    return found


class SlimmableUnit(nn.Module):
    """Convolution, BatchNorm and ReLU of a slimmable network, on one feature map or a concatenation.

    Args:
        in_widths: for each input, its channel number in every configuration.
        out_widths: the output's channel number in every configuration.
        stride: distance of the outputs, pixels; 1 on a concatenation.

    Each configuration has its own BatchNorm statistics, also where widths are equal: the layer's input
    depends on the layers before it.
    """

    def __init__(
        self, in_widths: Sequence[Sequence[int]], out_widths: Sequence[int], stride: int = 1
    ) -> None:
        super().__init__()
        self.in_widths, self.out_widths = in_widths, out_widths
        inputs, outputs = [sorted(set(widths)) for widths in in_widths], sorted(set(out_widths))
        self.conv: SlimmableConv2d
        if len(inputs) == 1:
            self.conv = SlimmableConv2d(inputs[0], outputs, 3, stride=stride, bias=False)
        else:
            self.conv = SlimmableJoin2d(inputs, outputs, 3, bias=False)
        self.norm = SlimmableBatchNorm2d(out_widths)

    def forward(self, choice: int, *features: Tensor) -> Tensor:
        """Map features (B, i_n, H, W) of a configuration to (B, o, H', W')."""
        conv, out_channels = self.conv, self.out_widths[choice]
        joins = isinstance(conv, SlimmableJoin2d)
        y = conv(features, out_channels) if joins else conv(*features, out_channels)
        return F.relu(self.norm(y, choice))

    def static(self, choice: int) -> nn.Sequential:
        """Return the ordinary layers of one configuration; they take the concatenation."""
        in_channels = [widths[choice] for widths in self.in_widths]
        out_channels = self.out_widths[choice]
        if isinstance(self.conv, SlimmableJoin2d):
            conv = self.conv.static(in_channels, out_channels)
        else:
            conv = self.conv.static(in_channels[0], out_channels)
        return nn.Sequential(conv, self.norm.static(out_channels, choice), nn.ReLU())


class ImageGate(nn.Module):
    """A gate on the image: two thin static convolutions at 1/2 and 1/4 of its size, mean, reduce, decide.

    Args:
        outputs: logits K, one per configuration.
        colors: image channels.
        features: channels of the second convolution.
    """

    def __init__(self, outputs: int, colors: int = 3, features: int = 16) -> None:
        super().__init__()
        self.outputs = outputs
        self.head = nn.Sequential(
            nn.Conv2d(colors, features // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(features // 2, features, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.reduce = nn.Conv2d(features, features // 2, 1)
        self.decide = nn.Conv2d(features // 2, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, outputs) of images (B, colors, H, W)."""
        r = F.relu(self.reduce(F.adaptive_avg_pool2d(self.head(x), 1)))
        logits: Tensor = self.decide(r)
        return logits.flatten(1)


class GatedNetwork(nn.Module):
    """A gate and the slimmable network whose configuration it picks, for each sample of a batch by itself.

    Args:
        gate: x -> logits (B, K), or (logits, *features) where the network takes ``features`` instead of x;
            its attribute ``outputs`` is K.
        network: a ``SlimmableNetwork`` of K configurations.

    Raises:
        ModelError: when the gate does not have one output per configuration.
    """

    def __init__(self, gate: nn.Module, network: SlimmableNetwork) -> None:
        super().__init__()
        check_outputs(int(gate.outputs), len(network.configurations), type(network).__name__)  # type: ignore[arg-type]
        self.gate = gate
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Run each sample of x (B, ...) in the configuration with the largest logit."""
        outputs = self.gate(x)
        logits, *features = outputs if isinstance(outputs, tuple) else (outputs,)
        return run_each(logits, features or [x], self.network)

    def every_path(self, x: Tensor) -> None:
        """Run the gate and every configuration on x, so that every BatchNorm sees it."""
        outputs = self.gate(x)
        features = outputs[1:] if isinstance(outputs, tuple) else (x,)
        for choice in range(len(self.network.configurations)):
            self.network(*features, choice)


def check_outputs(outputs: int, configurations: int, owner: str) -> None:
    """Refuse a gate that does not have one output per configuration.

    Raises:
        ModelError: with both numbers.
    """
    if outputs != configurations:
        raise ModelError(
            f"the gate of {owner} has {outputs} outputs for {configurations} configurations; expected one "
            "each. Train a gate of that many outputs, or keep as many configurations."
        )


def run_each(logits: Tensor, features: Sequence[Tensor], run: Callable[..., Tensor]) -> Tensor:
    """Call ``run(*features, choice)`` for each sample, choice being the index of its largest logit."""
    choices = logits.argmax(1).tolist()
    samples = zip(*(torch.split(feature, 1) for feature in features), strict=True)
    return torch.cat([run(*sample, choice) for sample, choice in zip(samples, choices, strict=True)])
