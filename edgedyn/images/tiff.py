"""TIFF of 16 bits and of floats, which Pillow does not read whole; and TIFF's writer, strip by strip."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tifffile

ERRORS: tuple[type[Exception], ...] = (tifffile.TiffFileError,)
_DTYPES = ("uint8", "uint16", "float32")
_ROWS = 64  # rows per strip


class Refusal(Exception):  # noqa: N818 - the reader of photos turns it into an ImageError with the path
    """A whole TIFF that holds no photo; the arguments are the fault and the expectation."""


def find_page(file: tifffile.TiffFile) -> Any:
    """Return the one full-size page.

    Raises:
        Refusal: when there are several, or none.
    """
    every: list[Any] = list(file.pages)
    pages = [page for page in every if not page.subfiletype & 1]  # 1 marks a reduced copy
    if len(pages) != 1:
        raise Refusal(f"{len(pages)} pages", "one")
    return pages[0]


def is_shallow(page: Any) -> bool:
    """Return whether Pillow reads the page whole: samples of 8 bits or of one."""
    return page.dtype is not None and page.dtype.name in ("uint8", "bool")


def decode(page: Any) -> tuple[np.ndarray, int]:
    """Return the samples of a page, (H, W, bands), with straight alpha, and its EXIF orientation.

    Raises:
        Refusal: for samples that are no gray or RGB photo.
    """
    colour = tifffile.PHOTOMETRIC(page.photometric).name
    if page.dtype is None or page.dtype.name not in _DTYPES or colour not in ("MINISBLACK", "RGB"):
        raise Refusal(f"{page.dtype} samples, {colour}", "uint8, uint16 or float32, MINISBLACK or RGB")
    if page.samplesperpixel > 4:
        raise Refusal(f"{page.samplesperpixel} bands", "gray or RGB, and at most one alpha")
    samples = _read(page)
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, 2)
    samples = samples.reshape(page.imagelength, page.imagewidth, -1)
    if samples.shape[2] not in ((1, 2) if colour == "MINISBLACK" else (3, 4)):
        raise Refusal(f"{samples.shape[2]} bands of {colour}", "gray or RGB, and at most one alpha")
    if samples.dtype == np.float32 and not ((samples >= 0) & (samples <= 1)).all():
        raise Refusal("float samples that are not in [0, 1] or not a number", "samples in [0, 1]")
    extra = [int(kind) for kind in page.extrasamples]
    if 0 in extra:
        raise Refusal("an extra band of unspecified meaning", "gray or RGB, and at most one alpha")
    if tifffile.EXTRASAMPLE.ASSOCALPHA in extra:
        samples = _straight(samples)
    return samples, int(page.tags[274].value if 274 in page.tags else 1)


def encode(
    file: BinaryIO, shape: tuple[int, int, int], dtype: np.dtype[Any], rows: Any, icc: bytes | None
) -> None:
    """Write a TIFF, deflated.

    Args:
        file: open for writing, seekable.
        shape: H, W and bands; 1 or 3 of colour, and one more is straight alpha.
        dtype: of the samples.
        rows: ``rows(top, bottom)`` returns the samples of these rows, (rows, W, bands).
        icc: colour profile.
    """
    height, _, bands = shape

    def strips() -> Iterator[bytes]:
        for top in range(0, height, _ROWS):
            strip = rows(top, min(top + _ROWS, height))
            yield zlib.compress(np.ascontiguousarray(strip, dtype.newbyteorder("<")).tobytes())

    tifffile.imwrite(
        file,
        strips(),
        shape=shape if bands > 1 else shape[:2],
        dtype=dtype,
        byteorder="<",
        photometric="rgb" if bands > 2 else "minisblack",
        planarconfig="contig" if bands > 1 else None,
        extrasamples=["unassalpha"] if bands in (2, 4) else None,
        rowsperstrip=_ROWS,
        compression="adobe_deflate",
        iccprofile=icc,
        metadata=None,
    )


def _read(page: Any) -> np.ndarray:
    """Return the samples of a page as tifffile orders them."""
    try:
        samples: np.ndarray = page.asarray()
        return samples
    except (ImportError, ValueError) as error:  # tifffile 2025 and later raise one or the other
        if isinstance(error, ValueError) and "imagecodecs" not in str(error):
            raise
        name = getattr(page.compression, "name", page.compression)
        raise Refusal(
            f"compression {name}, whose decoder is missing",
            "none or deflate, or the package imagecodecs (pip install imagecodecs)",
        ) from error


def _straight(samples: np.ndarray) -> np.ndarray:
    """Divide colours by their alpha (associated to straight alpha); black where alpha is 0."""
    alpha = samples[:, :, -1:].astype(np.float64)
    full = 1.0 if samples.dtype == np.float32 else float(np.iinfo(samples.dtype).max)
    colours = samples[:, :, :-1] * np.divide(full, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    if samples.dtype != np.float32:
        colours = np.rint(colours)
    straight: np.ndarray = np.dstack([colours.clip(0, full), alpha]).astype(samples.dtype)
    return straight
