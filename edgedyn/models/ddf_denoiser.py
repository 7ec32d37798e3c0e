"""A small residual denoiser with a decoupled dynamic filter in every block (DDF, arXiv 2104.14107).

    out = x - tail(blocks(head(x)))      block: x + 3x3(relu(DDF(relu(3x3(x)))))
    x, out: (B, 3 or 1, H, W) in [0, 1], any H and W

The network is this project's own; the paper has none for denoising. The channel filters come from the mean
of the whole feature map: in a tiled image each tile has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddf import DDFPack


class DDFBlock(nn.Module):
    """Residual block: 3x3, ReLU, DDFPack, ReLU, 3x3."""

    def __init__(self, channels: int, *, head: int, combine: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.dynamic = DDFPack(channels, head=head, kernel_combine=combine)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the branch; (B, C, H, W) both."""
        y: Tensor = self.last(torch.relu(self.dynamic(torch.relu(self.first(x)))))
        return x + y


class DDFDenoiser(nn.Module):
    """The denoiser; 129,533 parameters by default.

    Args:
        features: channels of every block.
        blocks: number of residual blocks.
        colors: image channels, 3 or 1.
        head: spatial filters per DDFPack.
        combine: ``mul`` or ``add``.

    Raises:
        ModelError: for no blocks, or features that a DDFPack cannot use.
    """

    def __init__(
        self,
        features: int = 32,
        blocks: int = 6,
        *,
        colors: int = 3,
        head: int = 1,
        combine: str = "mul",
    ) -> None:
        super().__init__()
        if blocks < 1 or features < 1 or colors < 1:
            raise ModelError(
                f"DDFDenoiser got features={features}, blocks={blocks}, colors={colors}; expected at least 1 "
                "of each."
            )
        self.head = nn.Conv2d(colors, features, 3, padding=1)
        self.blocks = nn.Sequential(*(DDFBlock(features, head=head, combine=combine) for _ in range(blocks)))
        self.tail = nn.Conv2d(features, colors, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1]."""
        noise: Tensor = self.tail(self.blocks(self.head(x)))
        return x - noise


NETWORK = DDFDenoiser
