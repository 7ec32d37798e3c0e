"""Crops of images, and the refusal of images without contents, which say nothing about a network.

constant    all values of a crop are the same
random      neighbouring pixels are uncorrelated; INT8 ranges of random values are wrong for photos
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgedyn.errors import CalibrationError

# Least correlation of neighbouring pixels. Random values reach 0.12, also as JPEG of quality 50 to 95 (20 of
# each, at 16 to 512 pixels per side); photos have at least 0.58 (Set12, 568 of BSDS500, 50 of PolyU, 26 of
# scikit-image), and 0.19 with noise of sigma 50.
CORRELATED = 0.2
_SATURATION = 3.0
_AREA = 8  # pixels per side
_OVERSHOOT = 0.02  # of resizing and sharpening, and of a black level
_DARKEST = 1 / 16  # of the brightest pixel of a set: 12 bits in uint16, or a division by 255 too many
_DRAWS = 64  # attempts per crop: a photo may have a margin without contents


def random_error(image: str, correlation: float) -> CalibrationError:
    """Return the refusal of an image of random values."""
    return CalibrationError(
        f"{image} is random: neighbouring pixels have a correlation of {correlation:.2f}; expected at least "
        f"{CORRELATED}, photos have 0.58 to 1. INT8 ranges of random values are wrong for images. Use photos."
    )


def refuse_off_scale(pixels: np.ndarray, name: str) -> None:
    """Refuse an image (H, W, C) whose areas are not on the scale of 0 to 1; its noise may exceed it.

    The means of 8 x 8 pixels of each channel are compared, less six standard errors each, so that no noise
    moves one of a million over the limit. A normalized image has areas far below 0.

    Raises:
        CalibrationError: naming the image, with the smallest and the largest mean.
    """
    side = min(_AREA, *pixels.shape[:2])
    height, width = (full // side * side for full in pixels.shape[:2])
    areas = pixels[:height, :width].reshape(height // side, side, width // side, side, -1)
    means, errors = areas.mean(axis=(1, 3)), areas.std(axis=(1, 3)) / side
    margin = 6 * errors + _OVERSHOOT
    if (means < -margin).any() or (means > 1 + margin).any():
        raise CalibrationError(
            f"{name} has areas of {means.min():.2f} to {means.max():.2f}; expected a picture, 0 black to 1 "
            "white. Pass pictures before any normalization, as uint8 or divided by their largest value, and "
            "state the network's values in the recipe: input.range, input.mean, input.std."
        )


def refuse_dark(brightest: float, name: str) -> None:
    """Refuse a set whose brightest pixel, 0 black, 1 white, is almost black.

    Raises:
        CalibrationError: naming the set, with the value.
    """
    if brightest < _DARKEST:
        raise CalibrationError(
            f"the brightest pixel of the set {name!r} is {brightest:.3g}; expected pictures, 0 black to 1 "
            "white. Integers are divided by the largest value of their type: divide values of fewer bits, "
            "such as 12 bits in uint16, by their white level, and others only once."
        )


def refuse_constant(crop: np.ndarray, path: Path) -> None:
    """Refuse a crop without contents.

    Raises:
        CalibrationError: naming the file.
    """
    if _is_constant(crop):
        raise CalibrationError(
            f"{path} is constant ({crop.mean():.3f}) in each crop drawn from it; expected a photo. Remove "
            "the file from the set."
        )


def draw_crops(
    images: Sequence[np.ndarray], size: tuple[int, int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the same random crop, (1, C, height, width), of images (H, W, C) of any size.

    A crop that is constant in one of the images is drawn again, a limited number of times.
    """
    for _ in range(_DRAWS):
        window = choose_window(images[0].shape, size, rng)
        crops = [crop(pixels, window) for pixels in images]
        if not any(map(_is_constant, crops)):
            break
    return crops


def choose_window(
    shape: tuple[int, ...], size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop of an image (H, W, C), which may be smaller."""
    top, left = (int(rng.integers(max(0, full - side) + 1)) for full, side in zip(shape, size, strict=False))
    return top, left, *size


def crop(pixels: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """Return a crop as (1, C, height, width) float32; a smaller image is reflected at its border."""
    top, left, height, width = window
    bottom, right = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    if bottom or right:
        pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="symmetric")
    crop = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(crop.transpose(2, 0, 1)[None], dtype=np.float32)


def augment_colors(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a crop (1, 3, H, W) with exchanged channels, three times as far from gray, clipped to [0, 1]."""
    exchanged = crop[:, rng.permutation(crop.shape[1])]
    gray = exchanged.mean(axis=1, keepdims=True)
    return np.ascontiguousarray((gray + _SATURATION * (exchanged - gray)).clip(0, 1), dtype=np.float32)


def correlate(pixels: np.ndarray) -> float:
    """Return the correlation of neighbouring pixels of (H, W, C): about 0 for random values, 1 at most.

    The gray image is correlated with itself, shifted by one pixel down and by one to the right; both are
    averaged. The result is the largest such value on four scales: pixels, and means of 2 x 2, 4 x 4 and 8 x 8
    pixels where there are at least 256 of them. Averaging removes the noise of a photo, whose contents extend
    over many pixels, and leaves random values random. For 256 random values the standard deviation is 0.044,
    and the limit of 0.2 is 4.5 times as large.
    """
    gray = pixels.mean(axis=2)
    correlations = [_neighbours(gray)]
    while gray.size >= 4 * 256:
        height, width = gray.shape[0] // 2 * 2, gray.shape[1] // 2 * 2
        if len(correlations) == 4 or not height or not width:
            break
        gray = gray[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
        correlations.append(_neighbours(gray))
    return max(correlations)


def _is_constant(crop: np.ndarray) -> bool:
    return bool((crop == crop[:, :, :1, :1]).all())  # a coloured area is constant, too


def _neighbours(gray: np.ndarray) -> float:
    centred = gray.astype(np.float64) - gray.mean()
    variance = float((centred**2).mean())
    shifted = [(centred[1:] * centred[:-1]), (centred[:, 1:] * centred[:, :-1])]
    means = [float(products.mean()) for products in shifted if products.size]
    return float(np.mean(means)) / variance if means and variance else 1.0
