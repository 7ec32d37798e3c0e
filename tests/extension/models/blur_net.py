"""A small denoiser: convolution, gated blur, convolution."""

from __future__ import annotations

from torch import nn

from edgedyn.layers.gated_blur import GatedBlur


def make(channels: int = 8) -> nn.Module:
    """Return the network, (B, 3, H, W) in and out, with initial weights."""
    first, last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), GatedBlur(channels), last)


NETWORK = make
