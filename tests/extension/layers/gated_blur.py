"""A blur whose strength a convolution predicts at every pixel.

    gate = sigmoid(Conv3x3(x))        y = x + gate * (mean of 3 x 3 neighbours - x)

x, y: (B, C, H, W)   gate: (B, 1, H, W)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.layers import Layer
from edgedyn.ops.gated_mean2d import gated_mean2d


class GatedBlur(nn.Module):
    """The layer as its authors would publish it, in terms of torch alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Blur (B, C, H, W)."""
        patches = F.unfold(x, 3, padding=1).view(x.shape[0], x.shape[1], 9, *x.shape[2:])
        return torch.lerp(x, patches.mean(2), torch.sigmoid(self.gate(x)))


class CanonicalGatedBlur(nn.Module):
    """The same weights, calling the op."""

    def __init__(self, layer: GatedBlur) -> None:
        super().__init__()
        self.gate = layer.gate

    def forward(self, x: Tensor) -> Tensor:
        """Blur (B, C, H, W)."""
        return gated_mean2d(x, torch.sigmoid(self.gate(x)))


def _examples() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yield one layer in evaluation mode with an input."""
    generator = torch.Generator().manual_seed(3)
    yield GatedBlur(5).eval(), (torch.randn(2, 5, 7, 10, generator=generator),)


LAYER = Layer(
    name="gated_blur",
    paper="none: an example",
    primitive="gated_mean2d",
    canonical={GatedBlur: CanonicalGatedBlur},
    examples=_examples,
)
