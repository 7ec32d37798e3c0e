"""A residual denoiser in the manner of DnCNN (arXiv 1608.03981) whose middle convolutions are ACDA layers.

out = x - net(x)        x, out: (B, 3 or 1, H, W) in [0, 1], any H and W
net: Conv3x3 ReLU, (depth - 2) x [ACDA BN ReLU], Conv3x3

All of it runs at full resolution. BatchNorm directly follows the last 1x1 convolution of its layer, and is
folded into it for deployment.
"""

from __future__ import annotations

from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.acda import MAX_BASES, ACDAConv


class ACDADnCNN(nn.Module):
    """The denoiser; 0.28 million parameters by default.

    Args:
        width: channels of every layer inside.
        depth: layers in all, at least 3; depth - 2 of them are dynamic.
        colors: image channels, 3 or 1.
        kernel_size: odd kernel side of the dynamic layers, at least 3.
        num_bases: kernels per pixel of a dynamic layer, 1 to 6.

    Raises:
        ModelError: for a depth without a dynamic layer, a width below 1, or arguments that ACDAConv refuses.
    """

    def __init__(
        self,
        width: int = 32,
        depth: int = 8,
        *,
        colors: int = 3,
        kernel_size: int = 3,
        num_bases: int = MAX_BASES,
    ) -> None:
        super().__init__()
        if depth < 3 or width < 1:
            raise ModelError(
                f"ACDADnCNN got width={width}, depth={depth}; expected width >= 1 and depth >= 3: the first "
                "and the last layer are ordinary convolutions, the layers between them are dynamic."
            )
        self.colors = colors
        layers: list[nn.Module] = [nn.Conv2d(colors, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            dynamic = ACDAConv(width, width, kernel_size, num_bases=num_bases, bias=False)
            layers += [dynamic, nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, colors, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1], any H and W."""
        noise: Tensor = self.body(x)
        return x - noise


NETWORK = ACDADnCNN
