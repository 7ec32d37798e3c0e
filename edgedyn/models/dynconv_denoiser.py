"""A denoiser that skips its blocks at smooth positions, by DynConv's gates (arXiv 1912.03203).

    out = x - net(x)        x, out: (B, 3 or 1, H, W) in [0, 1], any H and W

Space-to-depth by 2, a 3x3 convolution, gated InvertedResiduals at one resolution, a 3x3 convolution,
depth-to-space. A block's mask is empty in smooth areas, and set at edges and texture.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.dynconv import SparseInvertedResidual
from edgedyn.layers.dynconv.residual import InvertedResidual
from edgedyn.models.mallenet import pad_reflect


class DynConvDenoiser(nn.Module):
    """The denoiser; 0.18 M parameters by default.

    Args:
        features: channels C at half resolution.
        blocks: number of blocks.
        colors: image channels, 3 or 1.
        sparse: whether blocks are gated; the same network without gates otherwise.

    Raises:
        ModelError: for sizes below 1.
    """

    def __init__(self, features: int = 32, blocks: int = 12, *, colors: int = 3, sparse: bool = True) -> None:
        super().__init__()
        if min(features, blocks, colors) < 1:
            raise ModelError(
                f"DynConvDenoiser got features={features}, blocks={blocks}, colors={colors}; expected at "
                "least 1 of each."
            )
        make = SparseInvertedResidual if sparse else InvertedResidual
        self.head = nn.Conv2d(4 * colors, features, 3, padding=1)
        self.body = nn.Sequential(*[make(features, features) for _ in range(blocks)])
        self.tail = nn.Conv2d(features, 4 * colors, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1], any H and W."""
        height, width = x.shape[2:]
        halves = F.pixel_unshuffle(pad_reflect(x, 2), 2)
        noise = F.pixel_shuffle(self.tail(self.body(self.head(halves))), 2)
        return x - (noise if noise.shape == x.shape else noise[:, :, :height, :width])


NETWORK = DynConvDenoiser
