"""Image formats: how a file is recognised, by which package it is read, and as which format it is written."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageCms, features

from edgedyn.errors import TargetMissingError


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: Pillow's name of it.
        suffixes: of files; a result is written with the suffix of its photo.
        depths: bits per sample that can be written; none where the format is only read.
        holds_alpha: whether it can be written with transparency.
        options: how Pillow writes it.
    """

    name: str
    suffixes: tuple[str, ...]
    depths: tuple[int, ...] = ()
    holds_alpha: bool = True
    options: tuple[tuple[str, object], ...] = ()


FORMATS = {
    row.name: row
    for row in (
        Format("PNG", (".png",), (8, 16)),
        Format("JPEG", (".jpg", ".jpeg"), (8,), False, (("quality", 95), ("subsampling", 0))),
        Format("TIFF", (".tif", ".tiff"), (8, 16, 32)),
        Format("WEBP", (".webp",), (8,), options=(("quality", 95), ("use_sharp_yuv", True))),
        Format("BMP", (".bmp",), (8,), False),  # Pillow writes alpha, but does not read it back
        Format("AVIF", (".avif",), (8,), options=(("quality", 95), ("subsampling", "4:4:4"))),
        Format("GIF", (".gif",)),
        Format("HEIF", (".heic", ".heif", ".hif")),
    )
}
SUFFIXES = {suffix: row.name for row in FORMATS.values() for suffix in row.suffixes}
NAMES = "PNG, JPEG, TIFF, WebP, BMP, GIF, AVIF or HEIC"
# Pillow mode -> mode with the bands gray or R G B, then alpha.
PLAIN_MODES = {
    **{"1": "L", "L": "L", "LA": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA", "RGBX": "RGB"},
    **{"YCbCr": "RGB", "CMYK": "RGB"},
}
_STARTS = {
    **{
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"BM": "BMP",
        b"GIF87a": "GIF",
        b"GIF89a": "GIF",
    },
    **{b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"},
}
_AVIF = (b"avif", b"avis")
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def identify(start: bytes) -> str:
    """Return the name of a file's format by its first 64 bytes, or the empty string."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":  # major brand, version, compatible brands
        size = min(int.from_bytes(start[:4], "big"), len(start))
        brands = [start[8:12], *(start[at : at + 4] for at in range(16, size - 3, 4))]
        if any(brand in _AVIF for brand in brands):
            return "AVIF"
        return "HEIF" if any(brand in _HEIF for brand in brands) else ""
    return next((name for magic, name in _STARTS.items() if start.startswith(magic)), "")


def av1_bits(start: bytes) -> int:
    """Return the bits per sample of an AVIF by its configuration box; 8 where none is found in ``start``.

    Pillow decodes to 8 bits and does not report the depth of the file.
    """
    at = start.find(b"av1C\x81")  # marker and version; then profile and level, then the flags
    flags = start[at + 6] if at >= 0 and at + 6 < len(start) else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def need_reader(name: str) -> None:
    """Make Pillow able to read a format.

    Raises:
        TargetMissingError: with the command that installs the missing package.
    """
    if name == "HEIF":
        try:
            import pillow_heif
        except ImportError as error:
            raise TargetMissingError(
                "HEIC is read by pillow-heif, which is not installed. Install it: pip install 'edgedyn[heif]'"
            ) from error
        if name not in Image.OPEN:
            pillow_heif.register_heif_opener()
    elif name in ("WEBP", "AVIF") and not features.check(name.lower()):
        raise TargetMissingError(
            f"the installed Pillow has no {name}. Install one that has: pip install 'pillow>=11.3'"
        )


def to_plain(image: Image.Image) -> tuple[Image.Image, bytes | None, tuple[str, ...]]:
    """Return an image of gray or RGB, with or without alpha, its colour profile, and notes on the conversion.

    A CMYK image becomes sRGB by its profile; without one, by Pillow's plain formula.
    """
    icc: bytes | None = image.info.get("icc_profile")
    if image.mode == "CMYK":
        return _from_cmyk(image, icc)
    mode = PLAIN_MODES[image.mode]
    if "transparency" in image.info and not mode.endswith("A"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    return (image if mode == image.mode else image.convert(mode)), icc, ()


def _from_cmyk(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None, tuple[str, ...]]:
    fault = "it has no colour profile"
    if icc:
        try:
            target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
            source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted, target.tobytes(), ("CMYK became sRGB by its colour profile",)
        except (ImageCms.PyCMSError, OSError, ImportError) as error:
            fault = f"its colour profile cannot be used ({error})"
    return image.convert("RGB"), None, (f"CMYK became RGB by a plain formula: {fault}",)
