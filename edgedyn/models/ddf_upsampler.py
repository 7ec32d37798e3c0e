"""A small x2 upsampler of images, plain or guided by a sharper image (DDF-Up, arXiv 2104.14107).

    out = bilinear(x) + tail(relu(DDF-Up(body(head(x)), guide)))
    x: (B, colors, H, W)   guide: (B, guide_colors, 2H, 2W)   out: (B, colors, 2H, 2W), any H and W

The network is this project's own. The published layer needs its guide at the low resolution: pixel_unshuffle
rearranges the guide image to (B, 4 * guide_colors, H, W), without loss, and a 3x3 convolution turns it into
the features that the spatial branches read. Guided, it is joint upsampling: a depth map by its
photo, colours by a sharp gray image, a frame by a better exposed one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddf import DDFUpPack

SCALE = 2


class ConvBlock(nn.Module):
    """Residual block: 3x3, ReLU, 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the branch; (B, C, H, W) both."""
        y: Tensor = self.last(torch.relu(self.first(x)))
        return x + y


class DDFUpsampler(nn.Module):
    """The upsampler; parameters by default 86,943, joint 91,711.

    Args:
        features: channels of the body, and of the guide's features.
        blocks: residual blocks before the upsampling layer.
        colors: channels of the image to upsample.
        joint: whether a guide goes with every image.
        guide_colors: channels of the guide image.
        head: spatial filters per pair of generators.
        combine: ``mul`` or ``add``.

    Raises:
        ModelError: for arguments below 1, or a guide that is missing, unexpected or of another size.
    """

    def __init__(
        self,
        features: int = 32,
        blocks: int = 4,
        *,
        colors: int = 3,
        joint: bool = False,
        guide_colors: int = 3,
        head: int = 1,
        combine: str = "mul",
    ) -> None:
        super().__init__()
        if min(features, blocks, colors, guide_colors) < 1:
            raise ModelError(
                f"DDFUpsampler got features={features}, blocks={blocks}, colors={colors}, guide_colors="
                f"{guide_colors}; expected at least 1 of each."
            )
        self.guide_colors = guide_colors if joint else 0
        self.head = nn.Conv2d(colors, features, 3, padding=1)
        self.body = nn.Sequential(*(ConvBlock(features) for _ in range(blocks)))
        self.guide = nn.Conv2d(guide_colors * SCALE**2, features, 3, padding=1) if joint else None
        self.up = DDFUpPack(
            features,
            scale_factor=SCALE,
            head=head,
            nonlinearity="relu",
            joint_channels=features if joint else -1,
            kernel_combine=combine,
        )
        self.tail = nn.Conv2d(features, colors, 3, padding=1)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample (B, colors, H, W), guided by (B, guide_colors, 2H, 2W) where the network is joint."""
        self._refuse_other_guide(x, guide)
        features = self.body(self.head(x))
        if self.guide is None or guide is None:
            detail = self.up(features)
        else:
            detail = self.up(features, torch.relu(self.guide(F.pixel_unshuffle(guide, SCALE))))
        height, width = x.shape[2:]
        base = F.interpolate(x, size=(SCALE * height, SCALE * width), mode="bilinear", align_corners=False)
        y: Tensor = base + self.tail(torch.relu(detail))
        return y

    def _refuse_other_guide(self, x: Tensor, guide: Tensor | None) -> None:
        actual = None if guide is None else tuple(guide.shape)
        sides = SCALE * x.shape[2], SCALE * x.shape[3]
        expected = (x.shape[0], self.guide_colors, *sides) if self.guide_colors else None
        if actual != expected:
            raise ModelError(
                f"DDFUpsampler got an image {tuple(x.shape)} and the guide {actual}; expected {expected}. "
                "Build it with joint=True for a guide, which is an image at the output's resolution."
            )


NETWORK = DDFUpsampler
