"""Raw Bayer frames: headerless files of one sample per photosite, as packed planes or RGB of half the size.

    v      (H, W) unsigned integers, 8-bit: 1 byte, else 2 bytes, little-endian; row by row, nothing between
    x = (v - black) / (white - black)
    packed (H / 2, W / 2, 4): per 2 x 2 cell red, green of the red row, green of the blue row, blue
    RGB    (H / 2, W / 2, 3): red, the mean of both green ones, blue

A network of 4 channels takes packed planes. Without raw frames they are made of photos (``pack_photo``): the
sRGB curve is undone and one colour per photosite kept. These are synthetic: white balance, colour matrix and
tone curve of a camera stay in them, and the noise is only that of the set's noise model.

RGB is superpixel demosaicing: no value is interpolated from other cells, so the noise of neighbouring pixels
stays independent. RGB is linear, in the sensor's colours: no white balance, no gamma. Values are not clipped,
since noise goes below black.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from edgedyn.errors import CalibrationError
from edgedyn.reading import MAX_FILE_BYTES, read_bytes
from edgedyn.sections import Section


class RawSection(Section):
    """Layout and levels of headerless raw files; one sensor mode per set."""

    width: int = Field(ge=2, multiple_of=2, description="Photosites per row.")
    height: int = Field(ge=2, multiple_of=2, description="Rows of photosites.")
    bits: int = Field(
        ge=8, le=16, description="Bit depth; more than 8 bits are stored as 2 bytes, little-endian."
    )
    pattern: Literal["RGGB", "BGGR", "GRBG", "GBRG"] = Field(
        description="Colours of the upper left 2 x 2 cell, row by row."
    )
    black: float = Field(ge=0, description="Black level in the file's values; it becomes 0.")
    white: float = Field(description="White level in the file's values; it becomes 1.")

    @model_validator(mode="after")
    def _white_is_above_black(self) -> RawSection:
        if not self.black < self.white < 2**self.bits:
            raise ValueError(
                f"raw has black {self.black:g} and white {self.white:g}; expected 0 <= black < white < "
                f"{2**self.bits} (bits {self.bits})"
            )
        return self


def read_packed_bayer(path: Path, raw: RawSection) -> np.ndarray:
    """Read a raw frame as packed planes, (height / 2, width / 2, 4) float32, 0 black, 1 white, unclipped.

    Raises:
        CalibrationError: when the file's size or values contradict ``raw``.
        OSError: when the file cannot be read.
    """
    dtype = np.dtype("u1" if raw.bits == 8 else "<u2")
    data, expected = read_bytes(path, MAX_FILE_BYTES), raw.width * raw.height * dtype.itemsize
    if len(data) != expected:
        raise CalibrationError(
            f"raw frame {path} has {len(data)} bytes; expected {expected} for {raw.width} x {raw.height} "
            f"photosites of {raw.bits} bits. Fix raw: in the manifest; unpack packed raw files first."
        )
    values = np.frombuffer(data, dtype).reshape(raw.height, raw.width)
    if int(values.max()) >= 2**raw.bits:
        raise CalibrationError(
            f"raw frame {path} holds the value {int(values.max())}; expected less than {2**raw.bits} at "
            f"{raw.bits} bits. Fix raw.bits in the manifest; samples are little-endian."
        )
    light = (values.astype(np.float32) - np.float32(raw.black)) / np.float32(raw.white - raw.black)
    planes = [light[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    red, blue = raw.pattern.index("R"), raw.pattern.index("B")
    return np.stack([planes[i] for i in (red, red ^ 1, blue ^ 1, blue)], axis=2)  # ^ 1: the other of a row


def pack_photo(photo: np.ndarray) -> np.ndarray:
    """Return the packed planes (H // 2, W // 2, 4) of an sRGB photo (H, W, 3): linear, one colour each."""
    low = photo / np.float32(12.92)
    curve = ((photo.clip(0) + np.float32(0.055)) / np.float32(1.055)) ** np.float32(2.4)
    linear = np.where(photo <= 0.04045, low, curve)
    linear = linear[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2]
    sites = ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2))  # row, column, colour
    return np.stack([linear[row::2, column::2, colour] for row, column, colour in sites], axis=2)


def to_rgb(packed: np.ndarray) -> np.ndarray:
    """Return linear RGB (H, W, 3) of packed planes (H, W, 4)."""
    green = packed[:, :, 1:3].mean(axis=2, dtype=np.float32)
    return np.stack([packed[:, :, 0], green, packed[:, :, 3]], axis=2)
