"""Metrics: distances between two images or tensors, one function per metric, unit in its name.

    psnr_db = 10 log10(high^2 / mean (y - truth)^2)
    sqnr_db = 10 log10(sum reference^2 / sum (y - reference)^2)

Sums are float64, so that a float32 image of any size loses nothing to accumulation. Values are not clipped:
outputs outside [0, 1] count with their full error. Every public function of this file is a metric, so that a
new one needs no edit elsewhere. Only ``ssim`` needs scikit-image, which a device does not have.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedyn.errors import UsageError

Array = NDArray[Any]

# Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5; scikit-image truncates it at 3.5 sigma, radius 5.
_SSIM_SIGMA = 1.5
_SSIM_WINDOW = 11


def psnr_db(y: Array, truth: Array, *, high: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio; inf if both are identical.

    Args:
        y: any shape, on the scale [0, high].
        truth: the same shape.
        high: the largest valid value: 1.0, or 255 for 8-bit images.

    Raises:
        UsageError: for empty arrays, unequal shapes, values that are not finite, or ``high`` not above 0.
    """
    if not (math.isfinite(high) and high > 0):
        raise UsageError(
            f"psnr_db got high={high}; expected the largest valid value, a number above 0. "
            "Pass 1.0, or 255 for 8 bits."
        )
    a, b = _comparable("psnr_db", y, truth)
    return _ratio_db(high**2, float(np.mean((a - b) ** 2)))


def ssim(y: Array, truth: Array) -> float:
    """Return the mean structural similarity, at most 1, with the published window (Wang et al. 2004).

    Args:
        y: (H, W, C) in [0, 1], H and W at least 11; channels are averaged.
        truth: the same shape.

    Raises:
        UsageError: as ``psnr_db``, and for an image that is not (H, W, C) or smaller than the window.
    """
    from skimage.metrics import structural_similarity

    a, b = _comparable("ssim", y, truth)
    _require_image("ssim", a, smallest=_SSIM_WINDOW)
    similarity = structural_similarity(
        a,
        b,
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=_SSIM_SIGMA,
        use_sample_covariance=False,
    )
    return float(similarity)


def sqnr_db(y: Array, reference: Array) -> float:
    """Return the signal-to-quantization-noise ratio: inf if both are identical, -inf for a zero reference.

    Args:
        y: any shape, any scale.
        reference: the same shape; its energy is the signal.

    Raises:
        UsageError: for empty arrays, unequal shapes, or values that are not finite.
    """
    a, b = _comparable("sqnr_db", y, reference)
    return _ratio_db(float(np.sum(b**2)), float(np.sum((a - b) ** 2)))


def max_abs(y: Array, reference: Array) -> float:
    """Return the largest absolute difference, in the unit of the arrays; errors as ``sqnr_db``."""
    a, b = _comparable("max_abs", y, reference)
    return float(np.max(np.abs(a - b)))


def mean_abs_levels(y: Array, reference: Array) -> float:
    """Return the mean absolute difference in 8-bit grey levels; errors as ``sqnr_db``.

    Both arrays are on the scale [0, 1], where one level is 1/255.
    """
    a, b = _comparable("mean_abs_levels", y, reference)
    return 255 * float(np.mean(np.abs(a - b)))


def worst_tile_psnr_db(y: Array, truth: Array, *, tile: int = 64) -> float:
    """Return the lowest PSNR of all tiles; it shows a defect of one tile, which a mean over the image hides.

    Args:
        y: (H, W, C) in [0, 1].
        truth: the same shape.
        tile: side in pixels. Tiles do not overlap; remainders at the right and lower border are tiles too.

    Raises:
        UsageError: as ``psnr_db``, and for an image that is not (H, W, C) or a ``tile`` below 1.
    """
    if tile < 1:
        raise UsageError(f"worst_tile_psnr_db got tile={tile}; expected a side of at least 1 pixel. Pass 64.")
    a, b = _comparable("worst_tile_psnr_db", y, truth)
    _require_image("worst_tile_psnr_db", a, smallest=1)
    error = (a - b) ** 2
    rows, columns = range(0, a.shape[0], tile), range(0, a.shape[1], tile)
    worst = max(float(np.mean(error[h : h + tile, w : w + tile])) for h in rows for w in columns)
    return _ratio_db(1.0, worst)


def _comparable(metric: str, y: Array, reference: Array) -> tuple[Array, Array]:
    a, b = np.asarray(y), np.asarray(reference)
    if a.shape != b.shape:
        raise UsageError(
            f"{metric} got shapes {a.shape} and {b.shape}; expected equal ones. "
            "Crop or transpose one of them first."
        )
    if a.size == 0:
        raise UsageError(
            f"{metric} got empty arrays of shape {a.shape}; expected at least one value. Pass data."
        )
    return _finite(metric, a), _finite(metric, b)


def _finite(metric: str, values: Array) -> Array:
    if values.dtype.kind not in "fiub":
        raise UsageError(
            f"{metric} got dtype {values.dtype}; expected real numbers. Convert the array first."
        )
    count = int(np.count_nonzero(~np.isfinite(values)))
    if count:
        raise UsageError(
            f"{metric} got {count} of {values.size} values that are NaN or infinite; expected finite ones. "
            "Find the layer that produces them before measuring."
        )
    return values.astype(np.float64)


def _require_image(metric: str, image: Array, *, smallest: int) -> None:
    if image.ndim != 3 or min(image.shape[:2]) < smallest:
        raise UsageError(
            f"{metric} got shape {image.shape}; expected (H, W, C) with H and W at least {smallest}. "
            "Pass one image, channels last."
        )


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


METRICS: dict[str, Callable[..., float]] = {
    name: function
    for name, function in sorted(globals().items())
    if inspect.isfunction(function) and function.__module__ == __name__ and not name.startswith("_")
}
