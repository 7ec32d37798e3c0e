"""MalleNet: a denoiser with one MalleConv per level (arXiv 2201.00392, fig. 3).

    out = x - net(x)        x, out: (B, 3 or 1, H, W) in [0, 1], any H and W

Four levels work on x at 1, 1/2, 1/4 and 1/8 of its size by space-to-depth, with f, f, 2f and 4f channels.
From coarse to fine: 2 ResConvBlocks, MalleConv, 2 ResConvBlocks; bilinear x2, concatenation, Conv3x3. The
predictors have 6, 5, 4 and 3 stages from fine to coarse, so that every kernel grid is H/32 x W/32 and H, W
are padded to multiples of 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.malleconv import AffineMalleConv, ResConvBlock

WIDTHS = {"s": 16, "m": 32, "l": 48, "xl": 64}
PAD_MULTIPLE = 32
_LEVELS = 4


class MalleNet(nn.Module):
    """The denoiser; parameters at width 16, 32, 48, 64: 0.66, 2.17, 4.53, 7.74 million.

    Args:
        width: channels f of the finest level, or a size of the paper: ``s``, ``m``, ``l``, ``xl``.
        colors: image channels, 3 or 1.

    Raises:
        ModelError: for an unknown size name or a width below 1.
    """

    def __init__(self, width: int | str = "s", *, colors: int = 3) -> None:
        super().__init__()
        f = WIDTHS.get(width, 0) if isinstance(width, str) else width
        if f < 1:
            raise ModelError(
                f"MalleNet got width={width!r}; expected a positive number of channels or one of "
                f"{sorted(WIDTHS)}."
            )
        self.colors = colors
        channels = [f, f, 2 * f, 4 * f]
        self.heads = nn.ModuleList(nn.Conv2d(colors * 4**k, c, 3, padding=1) for k, c in enumerate(channels))
        self.merges = nn.ModuleList(
            nn.Conv2d(channels[k] + channels[k + 1], channels[k], 3, padding=1) for k in range(_LEVELS - 1)
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                ResConvBlock(c),
                ResConvBlock(c),
                AffineMalleConv(c, f, 6 - k),
                ResConvBlock(c),
                ResConvBlock(c),
            )
            for k, c in enumerate(channels)
        )
        self.tail = nn.Conv2d(f, colors, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, colors, H, W) in [0, 1], any H and W."""
        height, width = x.shape[2:]
        padded = pad_reflect(x, PAD_MULTIPLE)
        y: Tensor | None = None
        for k in reversed(range(_LEVELS)):
            head = self.heads[k](F.pixel_unshuffle(padded, 2**k) if k else padded)
            if y is not None:
                y = F.interpolate(y, size=head.shape[2:], mode="bilinear", align_corners=False)
                head = self.merges[k](torch.cat([head, y], dim=1))
            y = self.levels[k](head)
        noise: Tensor = self.tail(y)
        return x - (noise if padded is x else noise[:, :, :height, :width])


def pad_reflect(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right to multiples by reflection, repeated for small images."""
    height, width = x.shape[2:]
    bottom, right = -height % multiple, -width % multiple
    while bottom or right:  # one reflection reaches at most size - 1 pixels
        step_h, step_w = min(bottom, max(x.shape[2] - 1, 0)), min(right, max(x.shape[3] - 1, 0))
        mode = "reflect" if step_h or step_w else "replicate"  # an axis of one pixel has nothing to reflect
        if mode == "replicate":
            step_h, step_w = bottom, right
        x = F.pad(x, (0, step_w, 0, step_h), mode=mode)
        bottom, right = bottom - step_h, right - step_w
    return x


NETWORK = MalleNet
