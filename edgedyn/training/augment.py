"""Changes of clean training images: colours that the photos lack, and half the size.

    recolor   exchanged channels
              saturation    gray + s (x - gray)    s ~ U(0, 2.5)
              gamma         x^g                    ln g ~ U(-0.5, 0.5)
              exposure      a x                    a ~ U(0.4, 1.4)
    halve     half the height and width, antialiased: the blocks of JPEG vanish

x: (C, H, W) in [0, 1]. Each change of colour has its own chance; values are clipped to [0, 1] after each.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def recolor(x: Tensor, rng: np.random.Generator, probability: float) -> Tensor:
    """Change colours, (C, H, W) in [0, 1]; always draws as many random numbers."""
    chances, (s, g, a) = rng.random(4) < probability, rng.random(3).tolist()
    channels = rng.permutation(x.shape[0])
    if chances[0]:
        x = x[torch.from_numpy(channels)]
    if chances[1]:
        gray = x.mean(0, keepdim=True)
        x = (gray + 2.5 * s * (x - gray)).clamp(0, 1)
    if chances[2]:
        x = x ** float(np.exp(g - 0.5))
    if chances[3]:
        x = ((0.4 + a) * x).clamp(0, 1)
    return x


def halve(x: Tensor) -> Tensor:
    """Return (C, H, W) in [0, 1] at half its height and width, bicubic with antialiasing."""
    size = [x.shape[1] // 2, x.shape[2] // 2]
    return F.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
