"""FFDNet, a static denoiser to compare dynamic ones with (arXiv 1710.04026); it loads the published weights.

    y = shuffle(convs(cat(unshuffle(x), sigma)))       x, y: (B, 3 or 1, H, W) in [0, 1], sigma a constant map

12 (colour, 96 channels) or 15 (gray, 64 channels) 3x3 convolutions at half resolution. The noise level is
fixed when the network is built: a deployed program has one input. Training passes one level per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.models.mallenet import pad_reflect


class FFDNet(nn.Module):
    """FFDNet for one noise level.

    Args:
        sigma: noise level on the 0..255 scale.
        colors: image channels, 3 or 1.
        channels: channels between the convolutions; 0: as published, 96 for colour and 64 for gray.
    """

    def __init__(self, sigma: float = 25.0, *, colors: int = 3, channels: int = 0) -> None:
        super().__init__()
        published, depth = (96, 12) if colors == 3 else (64, 15)
        channels = channels or published
        layers: list[nn.Module] = [nn.Conv2d(4 * colors + 1, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(channels, 4 * colors, 3, padding=1))
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1], any H and W."""
        halves = F.pixel_unshuffle(pad_reflect(x, 2), 2)
        return self._denoise(x, halves, torch.full_like(halves[:, :1], self.sigma / 255))

    def at_levels(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1] with a noise level per sample, (B,) on the 0..255 scale."""
        halves = F.pixel_unshuffle(pad_reflect(x, 2), 2)
        level = (sigma / 255).to(x.dtype).view(-1, 1, 1, 1).expand_as(halves[:, :1])
        return self._denoise(x, halves, level)

    def run_chain(self, y: Tensor) -> Tensor:
        """Run the convolutions; (B, 4 * colors + 1, H / 2, W / 2) to (B, 4 * colors, H / 2, W / 2)."""
        z: Tensor = self.model(y)
        return z

    def _denoise(self, x: Tensor, halves: Tensor, level: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y = F.pixel_shuffle(self.run_chain(torch.cat([halves, level], dim=1)), 2)
        return y if y.shape == x.shape else y[:, :, :height, :width]


NETWORK = FFDNet
