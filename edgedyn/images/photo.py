"""Reading and writing photos: float32 pixels for the network; depth, mode, alpha, profile and EXIF are kept.

    pixels: (H, W, C) float32 in [0, 1], C = 1 (gray) or 3 (R, G, B)        alpha: (H, W) or None

PNG of 8 and 16 bits, JPEG, TIFF of 8 and 16 bits and float32, WebP, BMP, AVIF, the first frame of a GIF, HEIC
with pillow-heif. A palette becomes RGB, and so does CMYK, by its profile. Colour profile and EXIF are written
back. The EXIF orientation is applied to the pixels and its tag removed; the embedded thumbnail, which would
show the old picture, is removed too. TIFF keeps the profile but no EXIF, BMP keeps neither. Print resolution,
PNG gamma, comments and EXIF text that is not ASCII are lost.

A photo stays as its decoder gives it, 1 to 4 bytes per sample; only the rows in work are float32.

Device side: numpy, Pillow and tifffile only.
"""

from __future__ import annotations

import io
import os
import struct
import types
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import ExifTags, Image, UnidentifiedImageError

from edgedyn.errors import ImageError
from edgedyn.files import replacing
from edgedyn.images import png16, tiff
from edgedyn.images.formats import (
    FORMATS,
    NAMES,
    PLAIN_MODES,
    SUFFIXES,
    av1_bits,
    identify,
    need_reader,
    to_plain,
)
from edgedyn.reading import open_regular

# Twice Pillow's MAX_IMAGE_PIXELS, where it raises DecompressionBombError: 2 GB as float32 RGB.
MAX_PIXELS = 178_956_970
MAX_PIXELS_PER_BYTE = 2000  # deflate reaches 1032 : 1; no photo comes near
_SMALL_PIXELS = 2**24  # whatever their file says, they need little memory

_DEPTHS: dict[str, int] = {"uint8": 8, "uint16": 16, "float32": 32}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ROWS = 64  # rows that are converted at once
_HEADER = 2**20  # bytes at the start of an AVIF that hold its configuration
# EXIF orientation (CIPA DC-008, tag 274) -> the array turned upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_TURNS = {
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}

# Exceptions of Pillow, tifffile, struct and zlib on damaged files, found by cutting and flipping bytes.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error),
    *(Image.DecompressionBombError, tifffile.TiffFileError, RuntimeError, ArithmeticError),
)


@dataclass(frozen=True, eq=False)
class Photo:
    """One image file, upright.

    Attributes:
        samples: of 8 bits a Pillow image of mode ``L``, ``LA``, ``RGB`` or ``RGBA``, else an array
            (H, W, bands) uint16 or float32 of the same bands. ``write_rows`` changes them.
        mode: the file's colour mode in Pillow's letters, ``L``, ``LA``, ``P``, ``RGB``, ``RGBA``...
        format: Pillow's name of the file's format, for instance ``PNG``.
        icc: the colour profile, or None.
        exif: EXIF data after its 6-byte header, without orientation and thumbnail, or None.
        notes: sentences on conversions that lose something.
    """

    samples: Image.Image | np.ndarray
    mode: str
    format: str
    icc: bytes | None
    exif: bytes | None
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Bits per sample, 8 or 16, or 32 for float TIFF."""
        return _DEPTHS[self._dtype.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W and C; C is 1 for gray, 3 for R, G, B."""
        height, width, bands = self._size
        return height, width, 3 if bands > 2 else 1

    @property
    def has_alpha(self) -> bool:
        """Whether transparency stands beside the colours."""
        return self._size[2] in (2, 4)

    @property
    def pixels(self) -> np.ndarray:
        """The whole picture, (H, W, C) float32 in [0, 1]."""
        return self.read(0, self.shape[0], 0, self.shape[1])

    @property
    def alpha(self) -> np.ndarray | None:
        """Transparency, (H, W) float32 in [0, 1], or None."""
        if not self.has_alpha:
            return None
        return _unit(self._bands(0, self.shape[0])[:, :, -1])

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Return a part of the picture as (rows, columns, C) float32 in [0, 1]."""
        return _unit(self._bands(top, bottom, left, right)[:, :, : self.shape[2]])

    def write_rows(self, top: int, values: np.ndarray) -> None:
        """Replace rows by values (rows, W, C), clipped to [0, 1] and rounded to the photo's depth."""
        if len(values) > _ROWS:
            for first in range(0, len(values), _ROWS):
                self.write_rows(top + first, values[first : first + _ROWS])
            return
        colours, bottom = _quantized(values, self.depth), top + len(values)
        if not isinstance(self.samples, Image.Image):
            self.samples[top:bottom, :, : self.shape[2]] = colours
            return
        if self.has_alpha:
            colours = np.concatenate([colours, self._bands(top, bottom)[:, :, -1:]], axis=2)
        self.samples.paste(_image(colours), (0, top))

    def canvas(self, scale: int = 1) -> Photo:
        """Return a photo ``scale`` times as high and wide, black, for results; its alpha is enlarged."""
        height, width, bands = self._size
        size = (height * scale, width * scale)
        blank: Image.Image | np.ndarray
        if isinstance(self.samples, Image.Image):
            blank = Image.new(self.samples.mode, size[::-1])
            if self.has_alpha:
                blank.putalpha(self.samples.getchannel("A").resize(size[::-1], Image.Resampling.BILINEAR))
        else:
            blank = np.zeros((*size, bands), self._dtype)
            if (alpha := self.alpha) is not None:
                enlarged = Image.fromarray(alpha).resize(size[::-1], Image.Resampling.BILINEAR)
                blank[:, :, -1] = _quantized(np.asarray(enlarged), self.depth)
        return replace(self, samples=blank)

    @property
    def _size(self) -> tuple[int, int, int]:
        if isinstance(self.samples, Image.Image):
            return self.samples.height, self.samples.width, len(self.samples.getbands())
        height, width, bands = self.samples.shape
        return height, width, bands

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype("uint8") if isinstance(self.samples, Image.Image) else self.samples.dtype

    def _bands(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> np.ndarray:
        right = self._size[1] if right is None else right
        if not isinstance(self.samples, Image.Image):
            return self.samples[top:bottom, left:right]
        part = np.asarray(self.samples.crop((left, top, right, bottom)))
        return part.reshape(bottom - top, right - left, -1)


def read_image(path: Path, data: bytes | None = None) -> Photo:
    """Read an image of one frame; of a GIF the first, from a phone's multi-picture JPEG the main picture.

    Args:
        path: the file.
        data: its bytes, where they do not lie in the file system; then ``path`` is their name in errors.

    Raises:
        ImageError: when the file is not a whole image of one of the formats named above, of gray, palette,
            RGB or CMYK samples with or without alpha, has more than ``MAX_PIXELS`` pixels, or float samples
            outside [0, 1].
        TargetMissingError: when the package that reads its format is not installed.
    """
    try:
        with warnings.catch_warnings(), open_regular(path) if data is None else io.BytesIO(data) as file:
            warnings.simplefilter("ignore")  # Pillow's: sizes, checked here, and EXIF entries that it skips
            start = file.read(64)
            kind = identify(start)
            if not kind:
                raise _refusal(path, f"{start[:4]!r} at its start" if start else "no bytes", NAMES)
            need_reader(kind)
            file.seek(0)
            return _read_tiff(path, file) if kind == "TIFF" else _read_pillow(path, file, kind)
    except tiff.Refusal as refusal:
        raise _refusal(path, *refusal.args) from refusal
    except MemoryError as error:
        raise ImageError(f"image {path} needs more memory than is free. Make it smaller.") from error
    except _DAMAGE as error:
        raise _refusal(path, _fault(error), "a whole image file") from error


def write_image(photo: Photo, pixels: np.ndarray, path: Path) -> None:
    """Write a photo with other pixels; everything else stays as the photo has it.

    Values are clipped to [0, 1] and rounded to the photo's depth. See ``save`` for the format.

    Raises:
        ImageError: when the shape is not the photo's, values are not finite, and as ``save``.
        UsageError: when the file cannot be written.
    """
    if pixels.shape != photo.shape or not np.isfinite(pixels).all():
        raise _refusal(path, f"pixels {pixels.shape}", f"{photo.shape}, all finite")
    result = photo.canvas()
    result.write_rows(0, pixels)
    save(result, path)


def save(photo: Photo, path: Path) -> None:
    """Write a photo; the suffix of ``path`` selects the format. No partial file is left on failure.

    JPEG, WebP and AVIF have quality 95; JPEG and AVIF full colour resolution (4:4:4), which WebP lacks.

    Raises:
        ImageError: when the suffix is of no format, or the format cannot hold the photo's depth or alpha.
        UsageError: when the file cannot be written.
    """
    kind = check_format(photo, path)
    with replacing(path) as file:
        encode(photo, kind, file, path)


def check_format(photo: Photo, path: Path) -> str:
    """Return the format that the suffix of ``path`` names.

    Raises:
        ImageError: when it names none, or the format cannot hold the photo's depth or alpha.
    """
    row = FORMATS.get(SUFFIXES.get(path.suffix.lower(), ""))
    if row is None or not row.depths:
        expected = [suffix for suffix, name in SUFFIXES.items() if FORMATS[name].depths]
        raise _refusal(path, f"suffix {path.suffix!r}", f"one of {', '.join(expected)}")
    if photo.depth not in row.depths or (photo.has_alpha and not row.holds_alpha):
        actual = f"a photo of {photo.depth} bits, mode {photo.mode}"
        raise _refusal(path, actual, f"one that {row.name} can hold")
    need_reader(row.name)
    return row.name


def encode(photo: Photo, kind: str, file: BinaryIO, path: Path) -> None:
    """Write a photo as a file of a format into an open, seekable file; ``path`` is for errors.

    Raises:
        ImageError: when the format's encoder refuses the photo.
    """
    try:
        if kind == "TIFF":
            height, width, bands = photo._size
            tiff.encode(file, (height, width, bands), photo._dtype, photo._bands, photo.icc)
        elif not isinstance(photo.samples, Image.Image):
            for piece in png16.encode(photo.samples, photo.icc, photo.exif):
                file.write(piece)
        else:
            options = dict(FORMATS[kind].options)
            if photo.exif and kind != "BMP":
                options["exif"] = b"Exif\0\0" + photo.exif
            # without a descriptor: Pillow's own writing loses the system's reason, for instance a full disk
            sink: Any = types.SimpleNamespace(write=file.write, flush=file.flush)
            photo.samples.save(sink, kind, icc_profile=photo.icc, **options)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system
        raise _refusal(path, str(error), f"pixels that {kind} can hold") from error


def _fault(error: Exception) -> str:
    """Return the first line of a decoder's message; of an unknown start Pillow shows its own file object."""
    if isinstance(error, UnidentifiedImageError):
        return "a damaged header"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refusal(path: Path, actual: str, expected: str) -> ImageError:
    return ImageError(
        f"image {path}: found {actual}, expected {expected}. Check it, or convert it to 8-bit PNG."
    )


def _unit(samples: np.ndarray) -> np.ndarray:
    """Return samples as float32 on the scale of 0 to 1."""
    values = samples.astype(np.float32, order="C")
    if samples.dtype != np.float32:
        values /= np.float32(np.iinfo(samples.dtype).max)
    return values


def _quantized(values: np.ndarray, depth: int) -> np.ndarray:
    clipped: np.ndarray = np.clip(values, 0, 1).astype(np.float32)
    if depth == 32:
        return clipped
    clipped *= np.float32(2**depth - 1)
    rounded: np.ndarray = np.rint(clipped, out=clipped)
    return rounded.astype(np.uint8 if depth == 8 else np.uint16)


def _image(samples: np.ndarray) -> Image.Image:
    return Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)


def _read_pillow(path: Path, file: BinaryIO, kind: str, page: int = 0) -> Photo:
    image: Image.Image = Image.open(file, formats=[kind])
    if page:  # of a TIFF, behind its preview
        image.seek(page)
    _refuse_bomb(path, file, *image.size)
    # In a phone's JPEG (MPO) and HEIC, further frames are previews and depth maps.
    if kind in ("PNG", "WEBP", "AVIF") and getattr(image, "n_frames", 1) != 1:
        raise _refusal(path, "an animation", "one frame")
    is_deep = kind == "PNG" and png16.check_chunks(file) == 16
    if not is_deep and image.mode not in PLAIN_MODES:
        raise _refusal(path, f"colour mode {image.mode}", f"one of {', '.join(PLAIN_MODES)}")
    file.seek(0)
    start = file.read(_HEADER) if kind == "AVIF" else b""
    file.seek(0)
    image.load()
    orientation, exif, faults = _exif(image)
    if is_deep:
        samples = _UPRIGHT.get(orientation, _UPRIGHT[1])(png16.decode(file))
        return Photo(samples, _MODES[samples.shape[2]], kind, image.info.get("icc_profile"), exif, faults)
    plain, icc, notes = to_plain(image)
    notes = (*notes, *faults)
    if kind == "GIF" and getattr(image, "is_animated", False):
        notes = (*notes, "the first frame of an animation")
    if (bits := av1_bits(start) if kind == "AVIF" else int(image.info.get("bit_depth", 8))) > 8:
        notes = (*notes, f"{bits} bits per sample were reduced to 8")
    if orientation in _TURNS:
        plain = plain.transpose(_TURNS[orientation])
    elif plain is image:
        plain = image._new(image.im)  # without the file: no copy
    plain.info = {}  # so that a writer takes no metadata from there
    return Photo(plain, image.mode, kind, icc, exif, notes)


def _refuse_bomb(path: Path, file: BinaryIO, width: int, height: int) -> None:
    """Refuse a file whose header promises more pixels than memory, or than its bytes, can hold."""
    place, pixels = file.tell(), width * height
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    if not 0 < pixels <= MAX_PIXELS:
        raise _refusal(path, f"{width} x {height} pixels", f"1 to {MAX_PIXELS}")
    if pixels > max(_SMALL_PIXELS, MAX_PIXELS_PER_BYTE * size):
        raise _refusal(
            path, f"{width} x {height} pixels in {size} bytes", f"at most {MAX_PIXELS_PER_BYTE} per byte"
        )


def _exif(image: Image.Image) -> tuple[int, bytes | None, tuple[str, ...]]:
    """Return the orientation, the EXIF data without it, and a note where that is damaged."""
    try:
        return *_read_exif(image), ()
    except _DAMAGE:
        return 1, None, ("its EXIF data is damaged, and is left out",)


def _read_exif(image: Image.Image) -> tuple[int, bytes | None]:
    exif = image.getexif()
    orientation = int(exif.pop(ExifTags.Base.Orientation, 1))
    if not exif or image.format == "TIFF":
        return orientation, None
    details = exif.get_ifd(ExifTags.IFD.Exif)
    width, height = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
    if orientation >= 5 and width in details and height in details:
        details[width], details[height] = details[height], details[width]
    return orientation, exif.tobytes().removeprefix(b"Exif\0\0")


def _read_tiff(path: Path, file: BinaryIO) -> Photo:
    with tifffile.TiffFile(file) as opened:
        page = tiff.find_page(opened)
        _refuse_bomb(path, file, page.imagewidth, page.imagelength)
        if not tiff.is_shallow(page):
            samples, orientation = tiff.decode(page)
            upright = _UPRIGHT.get(orientation, _UPRIGHT[1])(samples)
            return Photo(upright, _MODES[samples.shape[2]], "TIFF", page.iccprofile, None)
        number = page.index
    file.seek(0)
    return _read_pillow(path, file, "TIFF", number)
