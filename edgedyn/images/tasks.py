"""Tasks of networks: how inputs are made from photos, and how outputs are compared.

    denoise     x = truth + noise                                  y and truth: (1, C, H, W)
    upscale     x = s x s means of truth, + noise [, guide]        y and truth: (1, C, s H, s W)
    classify    x = a crop of a photo, + noise                     y: logits (1, K), no truth
    keypoints   x = a crop of a photo, + noise                     y: heatmaps (1, K, h, w), no truth

The guide of a joint upsampler is the grey truth at full resolution, the same in each of its channels. A task
without truth is validated by how little deployment changes the output and the predictions; where photos carry
labels, also by the accuracy of the classes. Noisy photos without clean ones leave a picture without a truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgedyn.images.sample import Sample


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        output: description of the output for people, one phrase.
        scale: height and width of the truth, as a multiple of the input's.
        has_truth: whether the output is a picture whose truth is known.
        is_residual: whether the network predicts the difference of output and input.
        predictions: function from the output to the class, or to the position of each keypoint; None for a
            picture.
        is_labelled: whether the class of each sample is known.
    """

    output: str
    scale: int = 1
    has_truth: bool = True
    is_residual: bool = False
    predictions: Callable[[np.ndarray], np.ndarray] | None = None
    is_labelled: bool = False

    def measured_on(self, samples: Sequence[Sample]) -> Task:
        """Return the task as the samples can measure it: with labels or not, with a truth or not."""
        has_truth = self.has_truth and all(sample.has_truth for sample in samples)
        is_labelled = self.predictions is predict_classes and all(s.label is not None for s in samples)
        return replace(self, has_truth=has_truth, is_labelled=is_labelled)


def predict_classes(logits: np.ndarray) -> np.ndarray:
    """Return the class with the largest logit of each sample; logits (B, K), predictions (B,)."""
    return np.asarray(logits.argmax(axis=1))


def predict_keypoints(heatmaps: np.ndarray) -> np.ndarray:
    """Return the index of the largest pixel of each heatmap; heatmaps (B, K, h, w), predictions (B, K)."""
    return np.asarray(heatmaps.reshape(*heatmaps.shape[:2], -1).argmax(axis=2))


_IMAGE = "sRGB image, RGB order, 0 black, 1 white"
TASKS: Mapping[str, Task] = {
    "denoise": Task(_IMAGE, is_residual=True),
    "upscale": Task(_IMAGE, scale=2),
    "classify": Task("logits, one per class", has_truth=False, predictions=predict_classes),
    "keypoints": Task("heatmaps, one per keypoint", has_truth=False, predictions=predict_keypoints),
}


def shrink(image: np.ndarray, scale: int) -> np.ndarray:
    """Return the means of squares of scale x scale pixels; (1, C, H, W), H and W multiples of ``scale``."""
    if scale == 1:
        return image
    b, c, h, w = image.shape
    squares = image.reshape(b, c, h // scale, scale, w // scale, scale)
    return np.asarray(squares.mean(axis=(3, 5), dtype=image.dtype))


def make_guide(truth: np.ndarray, channels: int) -> np.ndarray:
    """Return the mean over the channels of the truth, repeated: (1, channels, H, W)."""
    return np.ascontiguousarray(truth.mean(axis=1, keepdims=True).repeat(channels, axis=1))
