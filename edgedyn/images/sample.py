"""One image of a set, and one sample drawn from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgedyn.images.bayer import RawSection
from edgedyn.images.pixels import read_pixels


@dataclass(frozen=True)
class Sample:
    """The inputs of a network with their truth, made of one crop of a photo.

    Attributes:
        inputs: the noisy image (1, C, H, W) float32, and the guide of a joint network; for a recipe's
            network, every input with the values that it takes.
        truth: the crop, 0 black, 1 white: the ideal output of a task that has a truth. For a noisy photo
            without a clean one, the noisy crop.
        sigma: noise level, 0..255 scale; for other noise than white Gaussian, its root mean square.
        source: file name.
        noise: condition of these samples in a report's rows; by default ``sigma=...``.
        has_truth: whether ``truth`` is the ideal output; a noisy photo without a clean one has none.
        label: index of the photo's class among the logits; None for a photo without a label.
        classes: class names of the set, in the order of the logits; empty where it gives none.
        short_side: pixels to which the photo's shorter side was resized; None for a photo of its own size, or
            for a labelled one that was resized to cover the input.
        picture: the noisy image, 0 black, 1 white, where the first input has other values.
    """

    inputs: tuple[np.ndarray, ...]
    truth: np.ndarray
    sigma: float
    source: str
    noise: str = ""
    has_truth: bool = True
    label: int | None = None
    classes: tuple[str, ...] = ()
    short_side: int | None = None
    picture: np.ndarray | None = None

    @property
    def noisy(self) -> np.ndarray:
        """The noisy image, (1, C, H, W), 0 black, 1 white."""
        return self.inputs[0] if self.picture is None else self.picture

    @property
    def condition(self) -> str:
        """Condition that a report's rows are measured at, for instance ``sigma=25``."""
        return self.noise or f"sigma={self.sigma:g}"


@dataclass(frozen=True, eq=False)
class SetImage:
    """One image of a set.

    Attributes:
        path: the file; for an image in memory, a name.
        sha256: digest of the file, or of the pixels of an image in memory.
        clean: for a noisy photo, the same scene without noise.
        pixels: image in memory, (H, W, C) float32; None for a file.
        label: index of its class among the logits, if it has one.
    """

    path: Path
    sha256: str
    clean: SetImage | None = None
    pixels: np.ndarray | None = field(default=None, repr=False)
    label: int | None = None

    def read(self, raw: RawSection | None = None) -> np.ndarray:
        """Return the pixels, (H, W, C) float32, 0 black, 1 white."""
        return read_pixels(self.path, raw) if self.pixels is None else self.pixels
