"""Images of an image set as (H, W, C) float32, 0 black, 1 white, from files, arrays and tensors.

    photos             every format of ``edgedyn.images.photo``, the same that ``edgedyn run`` reads
    .npy, .npz         one array
    .raw               a Bayer frame, described by the manifest's ``raw`` section (``edgedyn.images.bayer``)

An array is (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4 (packed Bayer), also as a batch of one; if both ends
could be channels, the last one is.
Integers are uint8 or uint16, scaled by their largest value. Floats are on the scale of 0 to 1; noise or a
normalization may exceed it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgedyn.errors import CalibrationError, ImageError, TargetMissingError
from edgedyn.images import formats
from edgedyn.images.bayer import RawSection, pack_photo, read_packed_bayer, to_rgb
from edgedyn.images.crops import refuse_off_scale
from edgedyn.images.photo import read_image
from edgedyn.reading import MAX_FILE_BYTES, open_regular

_ARRAYS = (".npy", ".npz")
# suffixes of the images in a folder; .raw is refused by name, since it needs a manifest
SUFFIXES = frozenset({*formats.SUFFIXES, *_ARRAYS, ".raw"})
# Unclipped noise of sigma 255 stays within 6 of the image; values beyond are on the scale of 0 to 255.
_LOWEST, _HIGHEST = -6.0, 7.0
_FIX = "It belongs to an image set: remove it there, or replace it."


def read_pixels(path: Path, raw: RawSection | None = None) -> np.ndarray:
    """Read an image file.

    Args:
        path: file of a format named above.
        raw: layout and levels of a ``.raw`` file.

    Raises:
        CalibrationError: naming the file, when it is damaged, of another format, a ``.raw`` file without
            ``raw``, or holds values that are not finite or not on the scale of 0 to 1.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".raw":
            if raw is None:
                raise CalibrationError(
                    f"{path} is a raw frame of unknown size and levels. Write a manifest with a raw: section "
                    "(width, height, bits, pattern, black, white)."
                )
            return to_pixels(read_packed_bayer(path, raw), str(path))
        if suffix in _ARRAYS:
            pixels = to_pixels(_read_array(path), str(path))
            refuse_off_scale(pixels, str(path))
            return pixels
        return read_image(path).pixels
    except (ImageError, TargetMissingError) as error:
        raise CalibrationError(f"{error} {_FIX}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} cannot be read ({_first_line(error)}). {_FIX}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_array(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            if len(names := loaded.files) != 1:
                raise CalibrationError(
                    f"{path} holds {len(names)} arrays ({', '.join(names[:5])}); expected one, the "
                    f"image. {_FIX}"
                )
            if (size := loaded.zip.infolist()[0].file_size) > MAX_FILE_BYTES:
                raise OSError(f"{size} bytes unpacked; expected at most {MAX_FILE_BYTES}")
            return np.asarray(loaded[names[0]])
        except (CalibrationError, OSError):
            raise
        except Exception as error:  # numpy, tokenize, zipfile and zlib raise all kinds
            raise OSError(str(error) or type(error).__name__) from error


def to_pixels(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array to (H, W, C) float32; ``name`` is for errors.

    Raises:
        CalibrationError: for another shape or type, and for values that are not finite or off the scale.
    """
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or not array.size or not {array.shape[0], array.shape[2]} & {1, 3, 4}:
        raise CalibrationError(
            f"{name} has shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4. {_FIX}"
        )
    if array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise CalibrationError(
            f"{name} holds {array.dtype}; expected uint8, uint16, or floats on the scale of 0 to 1. Convert "
            "it, for instance astype('uint8')."
        )
    pixels = np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind == "u":
        return pixels / np.float32(np.iinfo(array.dtype).max)
    if bad := int((~np.isfinite(pixels)).sum()):
        raise CalibrationError(f"{name} holds {bad} values that are NaN or infinite. {_FIX}")
    if pixels.min() < _LOWEST or pixels.max() > _HIGHEST:
        raise CalibrationError(
            f"{name} holds values from {pixels.min():g} to {pixels.max():g}; expected 0 black to 1 white. "
            "Divide by the white level; the recipe's input.range states the network's values."
        )
    return pixels


def unpack(item: Any, name: str) -> Iterator[np.ndarray]:
    """Yield the images of an item: of one image, array or tensor, or of a batch (B, ...) of them.

    Raises:
        CalibrationError: when the item is anything else.
    """
    if isinstance(item, Image.Image) and item.mode not in ("L", "RGB"):
        item = item.convert("RGB")
    if item is None or isinstance(item, tuple | list | dict | str | os.PathLike):
        size = f" of {len(item)}" if isinstance(item, tuple | list | dict) else ""
        fix = "lambda batch: batch[0]" if size else "PIL.Image.open"
        raise CalibrationError(
            f"{name} is a {type(item).__name__}{size}; expected an image, an array or a tensor. Select or "
            f"open the image, for instance transform={fix}."
        )
    try:
        array = np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, or one that needs gradients
        raise CalibrationError(
            f"{name} cannot become an array ({str(error).splitlines()[0]}). Convert it in transform, "
            "for instance transform=lambda batch: batch[0].detach().cpu().float()."
        ) from error
    for image in array if array.ndim == 4 else [array]:
        pixels = to_pixels(image, name)
        refuse_off_scale(pixels, name)
        yield pixels


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Return (H, W, channels) of (H, W, C): gray is repeated, colour averaged, packed Bayer made RGB.

    Four channels are packed Bayer of half the height and width (``edgedyn.images.bayer``).
    """
    if pixels.shape[2] == channels:
        return pixels
    if pixels.shape[2] == 4:
        return with_channels(to_rgb(pixels), channels)
    if channels == 4:
        return pack_photo(with_channels(pixels, 3))
    return pixels.repeat(channels, axis=2) if pixels.shape[2] == 1 else pixels.mean(axis=2, keepdims=True)
