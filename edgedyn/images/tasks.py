"""What a network is for: what its inputs are made of, and what its output is judged by.

    denoise     x = truth + noise                                  y and truth: (1, C, H, W)
    upscale     x = 2 x 2 means of truth, + noise [, guide]        y and truth: (1, C, 2 H, 2 W)
    classify    x = a crop of a photo, + noise                     y: logits (1, K), no truth
    keypoints   x = a crop of a photo, + noise                     y: heatmaps (1, K, h, w), no truth

The guide of a joint upsampler is the grey truth at full resolution, the same in each of its channels. Photos
carry no labels: a task without truth is judged by how little deployment changes the output and what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """One kind of network.

    Attributes:
        output: one phrase for people: what the output is.
        scale: how many times higher and wider than the input the truth is.
        has_truth: whether the output is a picture whose truth is known.
        is_residual: whether the output differs from the input by what the network predicts.
        predictions: what the output says: the class, or the position of each keypoint; None for a picture.
    """

    output: str
    scale: int = 1
    has_truth: bool = True
    is_residual: bool = False
    predictions: Callable[[np.ndarray], np.ndarray] | None = None


def answer_classes(logits: np.ndarray) -> np.ndarray:
    """Return the class of each sample; logits (B, K)."""
    return np.asarray(logits.argmax(axis=1))


def answer_keypoints(heatmaps: np.ndarray) -> np.ndarray:
    """Return the index of the largest pixel of each heatmap; heatmaps (B, K, h, w), predictions (B, K)."""
    return np.asarray(heatmaps.reshape(*heatmaps.shape[:2], -1).argmax(axis=2))


_IMAGE = "sRGB image, RGB order, 0 black, 1 white"
TASKS: Mapping[str, Task] = {
    "denoise": Task(_IMAGE, is_residual=True),
    "upscale": Task(_IMAGE, scale=2),
    "classify": Task("logits, one a class", has_truth=False, predictions=answer_classes),
    "keypoints": Task("heatmaps, one a keypoint", has_truth=False, predictions=answer_keypoints),
}


def shrink(image: np.ndarray, scale: int) -> np.ndarray:
    """Return the means of squares of ``scale`` pixels; (1, C, H, W), H and W multiples of it."""
    if scale == 1:
        return image
    b, c, h, w = image.shape
    squares = image.reshape(b, c, h // scale, scale, w // scale, scale)
    return np.asarray(squares.mean(axis=(3, 5), dtype=image.dtype))


def make_guide(truth: np.ndarray, channels: int) -> np.ndarray:
    """Return the grey truth, (1, channels, H, W)."""
    return np.ascontiguousarray(truth.mean(axis=1, keepdims=True).repeat(channels, axis=1))
