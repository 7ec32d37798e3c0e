"""Slimmable U-Net: a residual denoiser on four scales, whose gate picks one of K widths for each image.

    y = x - net(x)        x, y: (B, 3 or 1, H, W) in [0, 1], any H and W

Down: at 1, 1/2, 1/4 and 1/8 of the size two units (3x3 convolution, BatchNorm, ReLU), the first of stride 2
below the top. Up: bilinear x2, concatenation with the features of that scale, one unit. Tail: 3x3
convolution. On a concatenation a width is two prefixes, one per input. The gate follows arXiv 2110.08940, the
layout is arXiv 1505.04597's with strided convolutions. H, W are padded to multiples of 8 by reflection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.networks import GatedNetwork, ImageGate, SlimmableUnit, check_configurations
from edgedyn.layers.ddsnet.slimmable import SlimmableConv2d
from edgedyn.models.mallenet import pad_reflect

SCALES = 4
PAD_MULTIPLE = 2 ** (SCALES - 1)
# output channels, in the order of a configuration
LAYERS = (
    *(f"down_{scale}_{k}" for scale in range(SCALES) for k in range(2)),
    *(f"up_{scale}" for scale in reversed(range(SCALES - 1))),
)
_HALVING = {f"down_{scale}_0" for scale in range(1, SCALES)}
CONFIGURATIONS: tuple[tuple[int, ...], ...] = (
    (8, 8, 16, 16, 24, 24, 32, 32, 24, 16, 8),
    (8, 8, 24, 24, 40, 40, 64, 64, 40, 24, 8),
    (16, 16, 24, 24, 48, 48, 96, 96, 48, 24, 16),
    (16, 16, 32, 32, 64, 64, 128, 128, 64, 32, 16),
)


class SlimmableUNet(nn.Module):
    """The denoiser without its gate.

    Args:
        configurations: K vectors of 11 output channels in the order of ``LAYERS``; each contains the one
            before it, the last is the full width.
        colors: image channels, 3 or 1.

    Raises:
        ModelError: for other colors, or configurations that are not increasing or not of that length.
    """

    def __init__(self, configurations: Sequence[Sequence[int]] = CONFIGURATIONS, *, colors: int = 3) -> None:
        super().__init__()
        if colors not in (1, 3):
            raise ModelError(f"SlimmableUNet got colors={colors}; expected 3 or 1. Fix the arguments.")
        self.configurations = check_configurations(configurations, LAYERS, "SlimmableUNet")
        columns = dict(zip(LAYERS, zip(*self.configurations, strict=True), strict=True))
        self.colors = colors
        self.units = nn.ModuleDict()
        before: tuple[int, ...] = (colors,) * len(self.configurations)
        for name, widths in columns.items():
            inputs = [before]
            if name.startswith("up"):
                inputs = [columns[name.replace("up", "down") + "_1"], before]
            self.units[name] = SlimmableUnit(inputs, widths, 2 if name in _HALVING else 1)
            before = widths
        self.tail = SlimmableConv2d(sorted(set(before)), colors, 3)

    def forward(self, x: Tensor, choice: int) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1] in one configuration."""
        return _denoise(
            x,
            lambda name, *features: self.units[name](choice, *features),
            lambda features: self.tail(features, self.colors),
        )

    def static(self, choice: int) -> PlainUNet:
        """Return the ordinary network of one configuration."""
        units = {name: unit.static(choice) for name, unit in self.units.items()}  # type: ignore[operator]
        return PlainUNet(units, self.tail.static(self.configurations[choice][-1], self.colors))


class PlainUNet(nn.Module):
    """The U-Net of one configuration."""

    def __init__(self, units: dict[str, nn.Module], tail: nn.Conv2d) -> None:
        super().__init__()
        self.units, self.tail = nn.ModuleDict(units), tail

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1]."""
        return _denoise(x, self._run, self.tail)

    def _run(self, name: str, *features: Tensor) -> Tensor:
        y: Tensor = self.units[name](torch.cat(features, dim=1) if len(features) > 1 else features[0])
        return y


def _denoise(x: Tensor, unit: Callable[..., Tensor], tail: Callable[[Tensor], Tensor]) -> Tensor:
    """Run the U-Net; ``unit(name, *features)`` is one layer on the concatenation of features."""
    height, width = x.shape[2:]
    padded = pad_reflect(x, PAD_MULTIPLE)
    y, kept = padded, []
    for scale in range(SCALES):
        y = unit(f"down_{scale}_1", unit(f"down_{scale}_0", y))
        kept.append(y)
    for scale in reversed(range(SCALES - 1)):
        y = F.interpolate(y, size=kept[scale].shape[2:], mode="bilinear", align_corners=False)
        y = unit(f"up_{scale}", kept[scale], y)
    noise = tail(y)
    return x - (noise if padded is x else noise[:, :, :height, :width])


def gated_unet(
    configurations: Sequence[Sequence[int]] = CONFIGURATIONS, *, colors: int = 3, gate_features: int = 16
) -> GatedNetwork:
    """Return the denoiser with a gate on the image; 0.44 million parameters by default.

    Args:
        configurations: see ``SlimmableUNet``.
        colors: image channels, 3 or 1.
        gate_features: channels of the gate's second convolution.
    """
    network = SlimmableUNet(configurations, colors=colors)
    return GatedNetwork(ImageGate(len(network.configurations), colors, gate_features), network)


NETWORK = gated_unet
