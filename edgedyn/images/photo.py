"""Reading and writing photos: float32 pixels for the network; depth, mode, alpha, profile and EXIF are kept.

    pixels: (H, W, C) float32 in [0, 1], C = 1 (gray) or 3 (R, G, B)        alpha: (H, W) or None

PNG of 8 and 16 bits, JPEG, TIFF of 8 and 16 bits and float32. A palette becomes RGB. Colour profile and EXIF
are written back. The EXIF orientation is applied to the pixels and its tag removed; the embedded thumbnail,
which would show the old picture, is removed too. TIFF keeps the profile but no EXIF. Print resolution, PNG
gamma, comments and EXIF text that is not ASCII are lost.

Device side: numpy, Pillow and tifffile only. Pillow reduces 16-bit colour to 8 bits without a warning, so
``_png16_samples`` decodes 16-bit PNG, ``_png16`` writes it, and tifffile handles 16-bit TIFF.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import ExifTags, Image

from edgedyn.errors import ImageError
from edgedyn.files import replace_file

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
# Suffixes of the images in a folder, also of unreadable formats: naming such a file beats ignoring it.
IMAGE_SUFFIXES = frozenset({*SUFFIXES, ".bmp", ".webp"})
# Twice Pillow's MAX_IMAGE_PIXELS, where it raises DecompressionBombError: 2 GB as float32 RGB.
MAX_PIXELS = 178_956_970

_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {_PNG: "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF"}
_DEPTHS: dict[str, int] = {"uint8": 8, "uint16": 16, "float32": 32}
# Pillow mode -> mode with the bands gray or R G B, then alpha.
_PLAIN_MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}
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
# PNG colour type -> passes in which Pillow's decoder, which has no 16-bit colour mode, returns all 16 bits:
# gray as two 8-bit bands, gray with alpha as four, colour twice: "16B" keeps the high bytes; "16L", for the
# other byte order, the low ones. PNG filters depend on the bytes per pixel; each pass keeps them: 2, 4, 6, 8.
_PNG16_PASSES = {
    0: [("LA", "LA")],
    4: [("RGBA", "RGBA")],
    2: [("RGB", "RGB;16B"), ("RGB", "RGB;16L")],
    6: [("RGBA", "RGBA;16B"), ("RGBA", "RGBA;16L")],
}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}

# Exceptions of Pillow, tifffile, struct and zlib on damaged files, found by cutting and flipping bytes.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error),
    *(Image.DecompressionBombError, tifffile.TiffFileError),
)


@dataclass(frozen=True, eq=False)
class Photo:
    """One image file, upright.

    Attributes:
        pixels: (H, W, C) float32 in [0, 1]; C is 1 for gray, 3 for R, G, B.
        alpha: (H, W) float32 in [0, 1], or None.
        depth: bits per sample in the file, 8 or 16, or 32 for float TIFF.
        mode: the file's colour mode in Pillow's letters, ``L``, ``LA``, ``P``, ``RGB``, ``RGBA``...
        format: ``PNG``, ``JPEG`` or ``TIFF``.
        icc: the colour profile, or None.
        exif: EXIF data after its 6-byte header, without orientation and thumbnail, or None.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    depth: int
    mode: str
    format: str
    icc: bytes | None
    exif: bytes | None


def read_image(path: Path) -> Photo:
    """Read an image of one frame; from a phone's multi-picture JPEG, the main picture.

    Raises:
        ImageError: when the file is not a whole PNG, JPEG or TIFF of gray, palette or RGB samples with or
            without alpha, has more than ``MAX_PIXELS`` pixels, or float samples outside [0, 1].
    """
    try:
        data = path.read_bytes()
        kind = next((name for magic, name in _SIGNATURES.items() if data.startswith(magic)), "")
        if not kind:
            raise _refusal(path, f"{data[:4]!r} at its start" if data else "no bytes", "PNG, JPEG or TIFF")
        if kind == "TIFF":
            return _read_tiff(path, data)
        return _read_pillow(path, data, kind)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise _refusal(path, str(error) or type(error).__name__, "a whole image file") from error


def write_image(photo: Photo, pixels: np.ndarray, path: Path) -> None:
    """Write a photo with other pixels; everything else stays as the photo has it.

    Values are clipped to [0, 1] and rounded to the photo's depth. The suffix of ``path`` selects the format;
    JPEG has quality 95 and full colour resolution (4:4:4). No partial file is left on failure.

    Raises:
        ImageError: when the shape is not the photo's, values are not finite, the suffix is of no format, or
            the format cannot hold the photo's depth or alpha.
        UsageError: when the file cannot be written.
    """
    if pixels.shape != photo.pixels.shape or not np.isfinite(pixels).all():
        raise _refusal(path, f"pixels {pixels.shape}", f"{photo.pixels.shape}, all finite")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise _refusal(path, f"suffix {path.suffix!r}", f"one of {', '.join(SUFFIXES)}")
    bands = pixels if photo.alpha is None else np.dstack([pixels, photo.alpha])
    if (kind == "JPEG" and (photo.alpha is not None or photo.depth != 8)) or (
        kind == "PNG" and photo.depth > 16
    ):
        raise _refusal(path, f"a photo of {photo.depth} bits, mode {photo.mode}", f"one that {kind} can hold")
    samples = _quantized(bands, photo.depth)
    try:
        data = _encoded(photo, samples, kind)
    except (OSError, ValueError) as error:
        raise _refusal(path, str(error), f"pixels that {kind} can hold") from error
    replace_file(path, data)


def _refusal(path: Path, actual: str, expected: str) -> ImageError:
    return ImageError(
        f"image {path}: found {actual}, expected {expected}. Check it, or convert it to 8-bit PNG."
    )


def _photo(samples: np.ndarray, orientation: int, **rest: Any) -> Photo:
    depth = _DEPTHS[samples.dtype.name]
    scale = 1.0 if depth == 32 else 2.0**depth - 1
    bands = np.ascontiguousarray(_UPRIGHT.get(orientation, _UPRIGHT[1])(samples), dtype=np.float32)
    bands /= np.float32(scale)
    colours = 3 if bands.shape[2] > 2 else 1
    alpha = bands[:, :, colours].copy() if bands.shape[2] > colours else None
    return Photo(np.ascontiguousarray(bands[:, :, :colours]), alpha, depth, **rest)


def _quantized(bands: np.ndarray, depth: int) -> np.ndarray:
    clipped: np.ndarray = np.clip(bands, 0, 1).astype(np.float32)
    if depth == 32:
        return clipped
    rounded: np.ndarray = np.rint(clipped * np.float32(2**depth - 1))
    return rounded.astype(np.uint8 if depth == 8 else np.uint16)


def _read_pillow(path: Path, data: bytes, kind: str) -> Photo:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=[kind])
    # In a PNG, further frames are an animation; in a phone's JPEG (MPO) they are previews and depth maps.
    if kind == "PNG" and getattr(image, "n_frames", 1) != 1:
        raise _refusal(path, "an animation", "one frame")
    # Pillow takes a PNG that ends too early, and does not compare the checksums of pixel data.
    chunks = list(_png_chunks(data)) if kind == "PNG" else []
    is_deep = kind == "PNG" and data[24] == 16
    if not is_deep and image.mode not in _PLAIN_MODES:
        raise _refusal(path, f"colour mode {image.mode}", f"one of {', '.join(_PLAIN_MODES)}")
    image.load()
    orientation, exif = _exif(image)
    samples = _png16_samples(chunks) if is_deep else np.asarray(_plain(image))
    samples = samples.reshape(image.height, image.width, -1)
    mode = _MODES[samples.shape[2]] if is_deep else image.mode
    return _photo(samples, orientation, mode=mode, format=kind, icc=image.info.get("icc_profile"), exif=exif)


def _plain(image: Image.Image) -> Image.Image:
    mode = _PLAIN_MODES[image.mode]
    if "transparency" in image.info and not mode.endswith("A"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    return image.convert(mode)


def _exif(image: Image.Image) -> tuple[int, bytes | None]:
    exif = image.getexif()
    orientation = int(exif.pop(ExifTags.Base.Orientation, 1))
    if not exif or image.format == "TIFF":
        return orientation, None
    details = exif.get_ifd(ExifTags.IFD.Exif)
    width, height = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
    if orientation >= 5 and width in details and height in details:
        details[width], details[height] = details[height], details[width]
    return orientation, exif.tobytes().removeprefix(b"Exif\0\0")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG)
    while place < len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        (crc,) = struct.unpack_from(">I", data, place + 8 + size)
        if crc != zlib.crc32(name + body):
            raise ValueError(f"a damaged PNG chunk {name!r}")
        yield name, body
        if name == b"IEND":
            return
        place += 12 + size
    raise ValueError("a PNG without its end")


def _png16_samples(chunks: list[tuple[bytes, bytes]]) -> np.ndarray:
    if any(name == b"tRNS" for name, _ in chunks):
        raise ValueError("a 16-bit PNG with one colour declared transparent (tRNS)")
    width, height, _, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    packed = b"".join(body for name, body in chunks if name == b"IDAT")
    passes = [
        np.asarray(Image.frombytes(mode, (width, height), packed, "zip", raw, interlaced))
        for mode, raw in _PNG16_PASSES[colour]
    ]
    pairs = passes[0] if len(passes) == 1 else np.stack(passes, axis=-1)
    pairs = np.ascontiguousarray(pairs).reshape(height, width, -1)
    return pairs.view(">u2").astype(np.uint16)


def _png16(samples: np.ndarray, icc: bytes | None, exif: bytes | None) -> bytes:
    height, width, bands = samples.shape
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    # Filter 1 (Sub, the difference to the pixel on the left) for every row.
    lines = np.pad(rows, ((0, 0), (1, 0)), constant_values=1)
    lines[:, 1 + 2 * bands :] -= rows[:, : -2 * bands]
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR[bands], 0, 0, 0)}
    if icc:
        chunks[b"iCCP"] = b"ICC Profile\0\0" + zlib.compress(icc)
    if exif:
        chunks[b"eXIf"] = exif
    chunks |= {b"IDAT": zlib.compress(lines.tobytes()), b"IEND": b""}
    return _PNG + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )


def _encoded(photo: Photo, samples: np.ndarray, kind: str) -> bytes:
    if kind == "TIFF":
        return _encode_tiff(photo, samples)
    if photo.depth == 16:
        return _png16(samples, photo.icc, photo.exif)
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    image = Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)
    if photo.exif:
        options["exif"] = b"Exif\0\0" + photo.exif
    stream = io.BytesIO()
    image.save(stream, kind, icc_profile=photo.icc, **options)
    return stream.getvalue()


def _encode_tiff(photo: Photo, samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(
        stream,
        samples if samples.shape[2] > 1 else samples[:, :, 0],
        photometric="rgb" if samples.shape[2] > 2 else "minisblack",
        planarconfig="contig" if samples.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if photo.alpha is not None else None,
        compression="adobe_deflate",
        iccprofile=photo.icc,
        metadata=None,
    )
    return stream.getvalue()


def _straight(samples: np.ndarray) -> np.ndarray:
    """Divide colours by their alpha (associated to straight alpha); black where alpha is 0."""
    alpha = samples[:, :, -1:].astype(np.float64)
    full = 1.0 if samples.dtype == np.float32 else float(np.iinfo(samples.dtype).max)
    colours = samples[:, :, :-1] * np.divide(full, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    if samples.dtype != np.float32:
        colours = np.rint(colours)
    straight: np.ndarray = np.dstack([colours.clip(0, full), alpha]).astype(samples.dtype)
    return straight


def _read_tiff(path: Path, data: bytes) -> Photo:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        every: list[Any] = list(file.pages)
        pages = [page for page in every if not page.subfiletype & 1]  # 1 marks a reduced copy
        if len(pages) != 1:
            raise _refusal(path, f"{len(pages)} pages", "one")
        page = pages[0]
        if page.dtype is not None and page.dtype.name in ("uint8", "bool"):
            return _read_pillow(path, data, "TIFF")
        return _read_deep_tiff(path, page)


def _read_deep_tiff(path: Path, page: Any) -> Photo:
    colour = tifffile.PHOTOMETRIC(page.photometric).name
    if page.dtype is None or page.dtype.name not in _DEPTHS or colour not in ("MINISBLACK", "RGB"):
        raise _refusal(path, f"{page.dtype} samples, {colour}", "uint8, uint16 or float32, MINISBLACK or RGB")
    if not 0 < page.imagewidth * page.imagelength <= MAX_PIXELS:
        raise _refusal(path, f"{page.imagewidth} x {page.imagelength} pixels", f"1 to {MAX_PIXELS}")
    samples = page.asarray()
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, 2)
    samples = samples.reshape(page.imagelength, page.imagewidth, -1)
    if samples.shape[2] not in ((1, 2) if colour == "MINISBLACK" else (3, 4)):
        raise _refusal(path, f"{samples.shape[2]} bands of {colour}", "gray or RGB, and at most one alpha")
    if samples.dtype == np.float32 and not ((samples >= 0) & (samples <= 1)).all():
        raise _refusal(path, "float samples that are not in [0, 1] or not a number", "samples in [0, 1]")
    extra = [int(kind) for kind in page.extrasamples]
    if 0 in extra:
        raise _refusal(path, "an extra band of unspecified meaning", "gray or RGB, and at most one alpha")
    if tifffile.EXTRASAMPLE.ASSOCALPHA in extra:
        samples = _straight(samples)
    orientation = page.tags[274].value if 274 in page.tags else 1
    mode = _MODES[samples.shape[2]]
    return _photo(samples, int(orientation), mode=mode, format="TIFF", icc=page.iccprofile, exif=None)
