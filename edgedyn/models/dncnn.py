"""DnCNN, the first residual denoiser, a static one (arXiv 1608.03981); it loads the published weights.

    y = x - convs(x)       x, y: (B, 1 or 3, H, W) in [0, 1]; the convolutions predict the noise

17 3x3 convolutions of 64 channels at full resolution, their BatchNorm folded as in the published files. Each
weights file is for one noise level.
"""

from __future__ import annotations

from torch import Tensor, nn


class DnCNN(nn.Module):
    """DnCNN without BatchNorm.

    Args:
        colors: image channels, 3 or 1.
        depth: number of convolutions, 17 for one noise level.
        channels: channels between the convolutions.
    """

    def __init__(self, *, colors: int = 1, depth: int = 17, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(colors, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(channels, colors, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1], any H and W."""
        noise: Tensor = self.model(x)
        return x - noise


NETWORK = DnCNN
