"""Pictures of a report: input, output in float, output of the lowered program, and their difference.

The difference keeps its sign, around grey: a bias tints the panel, which absolute values would hide.
Beyond 0.5 / 10, which is 12.75 grey levels, it saturates.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np

from edgedyn.errors import UsageError
from edgedyn.images import metrics
from edgedyn.report.text import MINUS, TIMES, number

_GAIN = 10


@dataclass(frozen=True)
class Picture:
    """One validation image on its way through the network; arrays are (H, W, 1, 3 or 4) float32, [0, 1].

    Attributes:
        caption: the subject, and the image's licence where it asks for one.
        sigma: standard deviation of the noise in 8-bit grey levels.
        noisy: input of the network; packed Bayer (H, W, 4), as the other three then, is shown as RGB.
        float_: its output in float32, before lowering.
        device: output of the lowered program.
        truth: the image without noise.
    """

    caption: str
    sigma: float
    noisy: metrics.Array
    float_: metrics.Array
    device: metrics.Array
    truth: metrics.Array


def panels(picture: Picture, precision: str) -> list[dict[str, str]]:
    """Return the four panels of a picture: an image as data URI, its name, number and note each.

    Raises:
        UsageError: for an array that is not (H, W, 1), (H, W, 3) or (H, W, 4), not finite, or not of the
            truth's shape.
    """
    float_, device = np.asarray(picture.float_), np.asarray(picture.device)
    mean, most = metrics.mean_abs_levels(device, float_), 255 * metrics.max_abs(device, float_)
    difference = 0.5 + _GAIN * (_coloured(device) - _coloured(float_))
    return [
        _panel("Noisy", f"sigma {picture.sigma:g}", picture.noisy, picture),
        _panel("Float", "before lowering", float_, picture),
        _panel(precision, "from the lowered program", device, picture),
        {
            "uri": _png(difference),
            "name": f"Difference {TIMES} {_GAIN}",
            "note": f"{precision} {MINUS} float; grey is zero",
            "number": f"mean {number(mean, digits=3)}, largest {number(most, digits=3)} levels",
        },
    ]


def _panel(name: str, note: str, image: metrics.Array, picture: Picture) -> dict[str, str]:
    psnr = metrics.psnr_db(image, picture.truth)
    shown = f"{psnr:.2f} dB" if math.isfinite(psnr) else "identical to the truth"
    return {"uri": _png(_developed(image)), "name": name, "note": note, "number": shown}


def _coloured(image: metrics.Array) -> metrics.Array:
    """Return RGB of packed Bayer; other images as they are."""
    from edgedyn.images.bayer import to_rgb

    return to_rgb(image) if image.shape[2] == 4 else image


def _developed(image: metrics.Array) -> metrics.Array:
    """Return packed Bayer, which is linear, as RGB of a power of 1 / 2.2; other images as they are."""
    return _coloured(image).clip(0) ** (1 / 2.2) if image.shape[2] == 4 else image


def _png(image: metrics.Array) -> str:
    """Return (H, W, C) on [0, 1] as a data URI; lossless, because differences are a few grey levels."""
    from PIL import Image

    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UsageError(
            f"a picture has shape {image.shape}; expected (H, W, 1) or (H, W, 3). Put channels last."
        )
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
