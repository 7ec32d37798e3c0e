"""Predictions of a bundle about image files: classes with probabilities, or keypoints in the image's pixels.

    photo -> framed as in calibration (``edgedyn.images.framing``) -> program -> logits or heatmaps
    classify    softmax(logits), the five largest
    keypoints   position and value of the largest pixel of each heatmap, moved back into the photo

The manifest's key ``predictions`` is the contract: task, shorter side of the resized photo (0: the photo just
covers the input), class names. Device side: numpy and Pillow.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn.bundle.bundle import Bundle
from edgedyn.errors import BundleError, CheckFailedError

if TYPE_CHECKING:
    from edgedyn.device.session import Session
    from edgedyn.images.framing import Frame

MOST_CLASSES = 5  # of an image


def makes_predictions(bundle: Bundle) -> bool:
    """Return whether a bundle predicts classes or keypoints; else it returns images."""
    return bool(bundle.predictions)


def predict(session: Session, image: Path, data: bytes | None = None) -> dict[str, Any]:
    """Run an image file through a bundle that predicts.

    Example:
        predict(edgedyn.open_session("out"), Path("cat.jpg"))["classes"][0]["name"]

    Args:
        session: an open bundle.
        image: a photo of any size; colour becomes gray for a program of one channel, gray is repeated for one
            of three, and alpha is dropped.
        data: bytes of the file, where they are not read from ``image``.

    Returns:
        ``{"image": path, "classes": [{"index", "probability"[, "name"]}]}``, the most probable first, or
        ``{"image": path, "keypoints": [{"index", "x", "y", "score"}]}``. x and y are in pixels of the photo;
        0, 0 is the centre of its first one. The score is the heatmap's value.

    Raises:
        BundleError: for a bundle that makes no predictions, or names more or fewer classes than logits.
        ImageError: for a file that is no readable image.
        CheckFailedError: if the program returns another shape, or values that are not finite.
    """
    # Here, so that checking a bundle on a device needs no Pillow.
    from edgedyn.images.framing import frame
    from edgedyn.images.photo import read_image

    contract, spec = session.bundle.predictions, session.bundle.inputs[0]
    expected = session.bundle.outputs[0].shape
    ranks = {"classify": 2, "keypoints": 4}
    fits = len(spec.shape) == 4 and spec.shape[:2] in ((1, 1), (1, 3))
    if not fits or ranks.get(contract.get("task", "")) != len(expected):
        raise BundleError(
            f"bundle {session.bundle.path} takes {[s.shape for s in session.bundle.inputs]} and returns "
            f"{expected}, {contract.get('task', 'no prediction')}; expected one (1, C, H, W) image, C 1 or "
            "3, and logits or heatmaps. Call its program through Session.run."
        )
    pixels = _with_channels(read_image(image, data).pixels, spec.shape[1])
    framed = frame(pixels, (spec.shape[2], spec.shape[3]), contract["short_side"] or None)
    y = np.asarray(session.run(*session.make_inputs(framed.pixels))[0], np.float64)
    if y.shape != expected or not np.isfinite(y).all():
        raise CheckFailedError(
            f"bundle {session.bundle.path}, {image}: found {y.shape} of the program, "
            f"{int((~np.isfinite(y)).sum())} values not finite; expected {expected}, all finite. Run edgedyn "
            "check on it."
        )
    if contract["task"] == "classify":
        return {"image": str(image), "classes": _classes(y[0], contract["classes"], session.bundle)}
    return {"image": str(image), "keypoints": _keypoints(y[0], framed)}


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] == channels:
        return pixels
    return pixels.repeat(channels, axis=2) if pixels.shape[2] == 1 else pixels.mean(axis=2, keepdims=True)


def _classes(logits: np.ndarray, names: list[str], bundle: Bundle) -> list[dict[str, Any]]:
    if names and len(names) != len(logits):
        raise BundleError(
            f"bundle {bundle.path}: found {len(names)} class names, expected {len(logits)}, one per logit. "
            "Build it again."
        )
    powers = np.exp(logits - logits.max())
    probabilities = powers / powers.sum()
    order = np.argsort(-logits, kind="stable")[:MOST_CLASSES]  # of equal logits the first one wins
    return [
        {
            "index": int(index),
            **({"name": names[index]} if names else {}),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def _keypoints(heatmaps: np.ndarray, framed: Frame) -> list[dict[str, Any]]:
    (_, height, width), size = heatmaps.shape, framed.pixels.shape[2:]
    found = []
    for index, heatmap in enumerate(heatmaps):
        row, column = divmod(int(heatmap.argmax()), width)
        # the centre of a heatmap's pixel, in pixels of the crop
        x, y = ((column + 0.5) * size[1] / width - 0.5, (row + 0.5) * size[0] / height - 0.5)
        x, y = framed.to_photo(x, y)
        found.append({"index": index, "x": x, "y": y, "score": float(heatmap[row, column])})
    return found
