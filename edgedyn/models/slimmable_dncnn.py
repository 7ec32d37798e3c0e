"""Slimmable DnCNN: a residual denoiser whose gate picks one of K widths for each image (arXiv 2110.08940).

    y = x - tail(units(head(x)))        x, y: (B, 3 or 1, H, W) in [0, 1], any H and W

Head: 3x3 convolution, ReLU. Units: 3x3 convolution, BatchNorm, ReLU. Tail: 3x3 convolution. A configuration
is the vector of output channels of head and units. The backbone is DnCNN's (arXiv 1608.03981).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.networks import GatedNetwork, ImageGate, SlimmableUnit, check_configurations
from edgedyn.layers.ddsnet.slimmable import SlimmableConv2d

# In all but the last, both ends are wider than the middle: a starting point, not the result of a search.
CONFIGURATIONS: tuple[tuple[int, ...], ...] = tuple(
    (ends, *[middle] * 10, ends) for ends, middle in [(24, 16), (32, 24), (48, 40), (56, 56)]
)


class SlimmableDnCNN(nn.Module):
    """The denoiser without its gate.

    Args:
        configurations: K vectors of output channels, head first, as many numbers as layers before the tail;
            each contains the one before it, the last is the full width.
        colors: image channels, 3 or 1.

    Raises:
        ModelError: for other colors, or configurations that are not increasing, not of one length, or shorter
            than 2.
    """

    def __init__(self, configurations: Sequence[Sequence[int]] = CONFIGURATIONS, *, colors: int = 3) -> None:
        super().__init__()
        if colors not in (1, 3) or not configurations or len(configurations[0]) < 2:
            raise ModelError(
                f"SlimmableDnCNN got colors={colors} and configurations {list(configurations)[:1]} …; "
                "expected 3 or 1, and vectors of at least 2 channel numbers (head, units). Fix them."
            )
        names = ["head", *(f"units.{k}" for k in range(len(configurations[0]) - 1))]
        self.configurations = check_configurations(configurations, names, "SlimmableDnCNN")
        columns = list(zip(*self.configurations, strict=True))
        widths = [sorted(set(column)) for column in columns]
        self.colors = colors
        self.head = SlimmableConv2d(colors, widths[0], 3)
        self.units = nn.ModuleList(
            SlimmableUnit([before], after) for before, after in itertools.pairwise(columns)
        )
        self.tail = SlimmableConv2d(widths[-1], colors, 3)

    def forward(self, x: Tensor, choice: int) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1] in one configuration."""
        y = F.relu(self.head(x, self.configurations[choice][0]))
        for unit in self.units:
            y = unit(choice, y)
        return x - self.tail(y, self.colors)  # type: ignore[no-any-return]

    def static(self, choice: int) -> PlainDnCNN:
        """Return the ordinary network of one configuration."""
        first, *_, last = self.configurations[choice]
        units = [unit.static(choice) for unit in self.units]  # type: ignore[operator]
        head, tail = self.head.static(self.colors, first), self.tail.static(last, self.colors)
        return PlainDnCNN(nn.Sequential(head, nn.ReLU(), *units, tail))


class PlainDnCNN(nn.Module):
    """DnCNN of one configuration."""

    def __init__(self, noise: nn.Sequential) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1]."""
        y: Tensor = x - self.noise(x)
        return y


def gated_dncnn(
    configurations: Sequence[Sequence[int]] = CONFIGURATIONS, *, colors: int = 3, gate_features: int = 16
) -> GatedNetwork:
    """Return the denoiser with a gate on the image; 0.32 million parameters by default.

    Args:
        configurations: see ``SlimmableDnCNN``.
        colors: image channels, 3 or 1.
        gate_features: channels of the gate's second convolution.
    """
    network = SlimmableDnCNN(configurations, colors=colors)
    return GatedNetwork(ImageGate(len(network.configurations), colors, gate_features), network)


NETWORK = gated_dncnn
