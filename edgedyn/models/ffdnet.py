"""FFDNet, a static denoiser to compare dynamic ones with (arXiv 1710.04026); it loads the published weights.

    y = shuffle(convs(cat(unshuffle(x), sigma)))       x, y: (B, 3 or 1, H, W) in [0, 1], sigma a constant map

12 (colour, 96 channels) or 15 (gray, 64 channels) 3x3 convolutions at half resolution. The noise level is
fixed when the network is built: a deployed program has one input.
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
    """

    def __init__(self, sigma: float = 25.0, *, colors: int = 3) -> None:
        super().__init__()
        channels, depth = (96, 12) if colors == 3 else (64, 15)
        layers: list[nn.Module] = [nn.Conv2d(4 * colors + 1, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(channels, 4 * colors, 3, padding=1))
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1], any H and W."""
        height, width = x.shape[2:]
        halves = F.pixel_unshuffle(pad_reflect(x, 2), 2)
        level = torch.full_like(halves[:, :1], self.sigma / 255)
        y = F.pixel_shuffle(self.model(torch.cat([halves, level], dim=1)), 2)
        return y if y.shape == x.shape else y[:, :, :height, :width]


NETWORK = FFDNet
