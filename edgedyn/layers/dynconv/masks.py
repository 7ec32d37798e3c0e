"""The positions at which a gated block is evaluated (DynConv, arXiv 1912.03203): logits, mask, dilated mask.

    mask[p] = 1 where logits[p] >= 0, else 0
    mask[p] = 1 where logits[p] + g >= 0, else 0            in training, g ~ Logistic(0, 1)
    dilated[q] = max of mask[p] over |q - s p| <= reach       s: stride between the two resolutions

logits, mask: (B, 1, h, w)   dilated: (B, 1, s h, s w), the input positions of the convolution behind

The heads stay float32 in every precision: a decision is right or wrong, never nearly right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masks(NamedTuple):
    """Decision of a block: logits and mask (B, 1, h, w), and the dilated mask of its inner convolutions."""

    logits: Tensor
    mask: Tensor
    dilated: Tensor


class PooledMaskHead(nn.Module):
    """Mask logits of the classification networks: a 3x3 convolution plus a linear map of the mean of x."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 1)
        self.conv = nn.Conv2d(channels, 1, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 1, h, w) of x (B, C, H, W)."""
        mean = x.mean((2, 3), keepdim=True).flatten(1)  # XNNPACK averages only with keepdim (executorch 1.5)
        y: Tensor = self.conv(x) + self.fc(mean)[:, :, None, None]
        return y


class PointMaskHead(nn.Conv2d):
    """Mask logits of the pose networks: a 1x1 convolution."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, 1, 1, stride=stride)


class MaskUnit(nn.Module):
    """Decide where a block is evaluated; the authors have two classes of this name, one per head.

    The gradient passes straight through the decision, as that of sigmoid(logits). In training mode, while
    ``noisy`` is set, the decision adds noise to the logits, the difference of two Gumbel variables (the
    paper's section 3.1): only logits far from 0 then decide reliably.

    Args:
        head: x -> logits, ``PooledMaskHead`` or ``PointMaskHead``.
        dilate_stride: stride between the dilated mask's resolution and the mask's.
    """

    def __init__(self, head: nn.Module, dilate_stride: int = 1) -> None:
        super().__init__()
        self.maskconv, self.dilate_stride = head, dilate_stride
        self.noisy = True

    def forward(self, x: Tensor) -> Masks:
        """Return logits, mask and dilated mask; a logit of 0 is active."""
        logits = self.maskconv(x)
        noisy = logits + _logistic(logits) if self.training and self.noisy else logits
        soft = noisy.sigmoid()
        mask = (noisy >= 0).to(x.dtype) + (soft - soft.detach())
        return Masks(logits, mask, dilate(mask.detach(), self.dilate_stride))


def _logistic(like: Tensor) -> Tensor:
    """Draw from the logistic distribution, in the shape and type of a tensor."""
    uniform = torch.rand_like(like, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform).to(like.dtype)


def dilate(mask: Tensor, stride: int = 1) -> Tensor:
    """Dilate a mask (B, 1, h, w) by 3 x 3 on the grid that is ``stride`` times as fine."""
    b, _, h, w = mask.shape
    spread = mask.new_zeros(b, 1, h * stride, w * stride)
    spread[:, :, ::stride, ::stride] = mask
    return F.max_pool2d(spread, 3, stride=1, padding=1)


def decide(logits: Tensor, one: Tensor) -> Tensor:
    """Return 1 where logits >= 0, else 0, in their own type.

    ``logits >= 0`` would leave XNNPACK's delegate, which has no comparison (executorch 1.5). Clamped to
    [-1, 0] a negative value, however small, has the floor -1, and any other the floor 0.

    Args:
        logits: (B, 1, h, w).
        one: 1 in (1, 1, 1, 1). A sum with a Python number keeps XNNPACK from one memory layout for all
            activations, without which no layer behind can have dynamic ranges.
    """
    return logits.clamp(-1, 0).floor() + one


class CanonicalMaskUnit(nn.Module):
    """MaskUnit for deployment; the dilated mask has the input size of the convolution behind.

    Args:
        unit: the reference.
        stride: stride between the dilated mask's resolution and the mask's.
        reach: dilation radius, the reach of the convolution behind, in pixels of the dilated mask.
    """

    def __init__(self, unit: MaskUnit, *, stride: int = 1, reach: int = 1) -> None:
        super().__init__()
        self.maskconv, self.stride, self.reach = unit.maskconv, stride, reach
        weight = next(unit.maskconv.parameters())
        side = 2 * reach + 1
        self.register_buffer("window", weight.new_ones(1, 1, side, side).detach(), persistent=False)
        self.register_buffer("one", weight.new_ones(1, 1, 1, 1).detach(), persistent=False)
        self.window: Tensor
        self.one: Tensor

    def forward(self, x: Tensor) -> Masks:
        """Return logits, mask and dilated mask of x (B, C, H, W)."""
        logits = self.maskconv(x)
        mask = decide(logits, self.one)
        if self.stride == 1:
            return Masks(logits, mask, F.max_pool2d(mask, 2 * self.reach + 1, stride=1, padding=self.reach))
        # one transposed convolution inserts the zeros and counts the active neighbours
        left = [
            size - 1 - (cells - 1) * self.stride
            for size, cells in zip(x.shape[2:], mask.shape[2:], strict=True)
        ]
        count = F.conv_transpose2d(
            mask, self.window, stride=self.stride, padding=self.reach, output_padding=left
        )
        return Masks(logits, mask, count.clamp(max=1))


class AuthorsMask:
    """A mask as the authors' blocks expect it: ``hard`` (B, 1, h, w), and ``soft``, its logits."""

    def __init__(self, hard: Tensor, soft: Tensor | None = None) -> None:
        self.hard, self.soft, self.flops_per_position = hard, soft, 0


class AuthorsMaskUnit(nn.Module):
    """A MaskUnit with the call of the authors' class, for users' blocks around it.

    x, meta -> {"std": mask, "dilate": dilated}, followed by meta where the head is a single convolution. It
    stores nothing in meta: a deployed program has no outputs besides its return value.
    """

    def __init__(self, unit: MaskUnit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor, meta: Any = None) -> Any:
        """Decide for x (B, C, H, W)."""
        logits, mask, dilated = self.unit(x)
        masks = {"std": AuthorsMask(mask, logits), "dilate": AuthorsMask(dilated)}
        return (masks, meta) if isinstance(self.unit.maskconv, PointMaskHead) else masks


class Selection(nn.Module):
    """Select the active positions of a mask, at most k of them; see ``capacity.Grid``.

    Stays float32 in every precision: it counts positions, and float16 has no 2049.

    Args:
        capacity: k, or all positions where there are fewer.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions (k,), slots (1, 1, h, w) and overflow () of a mask (1, 1, h, w)."""
        flat = mask.flatten()
        count = flat.shape[0]
        k = min(self.capacity, count)
        place = flat * flat.cumsum(0) + (1 - flat) * (k + 1.0) - 1.0
        slots = place.clamp(max=k).long()
        # Not topk: TensorRT takes at most 3840. Nor can it scatter into a tensor shorter than the index:
        # scatter into all slots, then cut off slot k, which inactive positions share.
        every = torch.arange(count, dtype=flat.dtype, device=flat.device)
        positions = flat.new_zeros(count + 1).scatter(0, slots, every)[:k].long()
        return positions, slots.view(mask.shape), (flat.sum() - float(k)).clamp(min=0)
