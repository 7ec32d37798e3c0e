"""Framing: how a whole photo becomes the input of a network that classifies it or finds its keypoints.

    photo (h, w) -> resized, its shorter side to ``short_side`` pixels -> crop (H, W) around the centre

Without ``short_side`` the photo is resized so that it just covers H x W. A side that stays smaller than the
crop is reflected at its end. Calibration, validation and ``edgedyn run`` frame photos with the same function.
Device side: numpy and Pillow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from edgedyn.images.crops import crop

_LONGEST = 32


@dataclass(frozen=True)
class Frame:
    """A photo as the input of a network, and where its pixels lie in the photo.

    Attributes:
        pixels: (1, C, H, W) float32.
        top: first row of the crop in the resized photo.
        left: first column.
        scale: resized height and width per height and width of the photo.
        start: first row and column of the photo that were resized.
    """

    pixels: np.ndarray
    top: int
    left: int
    scale: tuple[float, float]
    start: tuple[int, int] = (0, 0)

    def to_photo(self, x: float, y: float) -> tuple[float, float]:
        """Return a position in the crop as a position in the photo; 0, 0 is the centre of the first pixel."""
        (down, across), (row, column), half = self.scale, self.start, 0.5
        return (x + self.left + half) / across - half + column, (y + self.top + half) / down - half + row


def frame(photo: np.ndarray, size: tuple[int, int], short_side: int | None = None) -> Frame:
    """Resize a photo (h, w, C) and crop ``size`` = (H, W) around its centre.

    Of a photo more than 32 times as long as wide only the middle is resized, which bounds the memory.
    """
    longest = _LONGEST * min(photo.shape[:2])
    start = tuple(max(0, side - longest) // 2 for side in photo.shape[:2])
    photo = photo[start[0] : start[0] + longest, start[1] : start[1] + longest]
    height, width = photo.shape[:2]
    if short_side is None:
        covering = max(size[0] / height, size[1] / width)
        short_side = math.ceil(min(height, width) * covering - 1e-9)  # 1e-9: a rounding is no pixel
    resized = photo if min(height, width) == short_side else resize(photo, short_side)
    top, left = (max(0, full - side) // 2 for full, side in zip(resized.shape, size, strict=False))
    scale = (resized.shape[0] / height, resized.shape[1] / width)
    return Frame(crop(resized, (top, left, *size)), top, left, scale, (start[0], start[1]))


def resize(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Resize (H, W, C) so that its shorter side has ``short_side`` pixels; antialiased, without overshoot."""
    height, width, _ = pixels.shape
    scale = short_side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    planes = (
        Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR) for plane in np.moveaxis(pixels, 2, 0)
    )
    return np.stack([np.asarray(plane, np.float32) for plane in planes], axis=2)
