"""PNG of 16 bits per sample, which Pillow reduces to 8 bits in colour without a warning; and PNG's checksums.

file = signature, then chunks: length (4), name (4), body, CRC of name and body (4), all big-endian
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # bands -> PNG colour type
# PNG colour type -> passes in which Pillow's decoder, which has no 16-bit colour mode, returns all 16 bits:
# gray as two 8-bit bands, gray with alpha as four, colour twice: "16B" keeps the high bytes; "16L", for the
# other byte order, the low ones. PNG filters depend on the bytes per pixel; each pass keeps them: 2, 4, 6, 8.
_PASSES = {
    0: [("LA", "LA")],
    4: [("RGBA", "RGBA")],
    2: [("RGB", "RGB;16B"), ("RGB", "RGB;16L")],
    6: [("RGBA", "RGBA;16B"), ("RGBA", "RGBA;16L")],
}
_ROWS = 64  # rows that are converted at once
_PIECE = 2**20  # bytes of a chunk that are read at once


def check_chunks(file: BinaryIO) -> int:
    """Return the bits per sample; Pillow takes a PNG that ends too early and compares no checksums of pixels.

    Raises:
        ValueError: for a damaged chunk, or a file without its end.
    """
    depth = 0
    for name, body in _chunks(file):
        size = 0
        for piece in body:
            if name == b"IHDR" and not size and len(piece) == 13:
                depth = piece[8]
            size += len(piece)
    return depth


def decode(file: BinaryIO) -> np.ndarray:
    """Return the samples of a 16-bit PNG, (H, W, bands) uint16.

    Raises:
        ValueError: for a file that is damaged, or has one colour declared transparent.
    """
    head, packed = b"", []
    for name, body in _chunks(file):
        if name == b"tRNS":
            raise ValueError("a 16-bit PNG with one colour declared transparent (tRNS)")
        data = b"".join(body)
        if name == b"IHDR":
            head = data
        elif name == b"IDAT":
            packed.append(data)
    width, height, _, colour, _, _, interlaced = struct.unpack(">IIBBBBB", head)
    compressed = b"".join(packed)
    packed.clear()
    samples: np.ndarray = np.empty((height, width, next(b for b, c in _COLOURS.items() if c == colour)), "u2")
    passes = _PASSES[colour]
    for number, (mode, raw) in enumerate(passes):
        image = Image.frombytes(mode, (width, height), compressed, "zip", raw, interlaced)
        for top in range(0, height, _ROWS):
            strip = image.crop((0, top, width, min(top + _ROWS, height)))
            octets = np.asarray(strip).astype(np.uint16)
            here = samples[top : top + _ROWS]
            if len(passes) == 1:
                pairs = octets.reshape(*here.shape, 2)
                here[:] = pairs[..., 0] << 8 | pairs[..., 1]
            elif number == 0:
                here[:] = octets << 8
            else:
                here |= octets
    return samples


def encode(samples: np.ndarray, icc: bytes | None, exif: bytes | None) -> Iterator[bytes]:
    """Yield the pieces of a PNG file of (H, W, bands) uint16, few rows at a time."""
    height, width, bands = samples.shape
    yield SIGNATURE
    yield from _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _COLOURS[bands], 0, 0, 0))
    if icc:
        yield from _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    if exif:
        yield from _chunk(b"eXIf", exif)
    deflate = zlib.compressobj()
    for line in _lines(samples):
        if data := deflate.compress(line):
            yield from _chunk(b"IDAT", data)
    yield from _chunk(b"IDAT", deflate.flush())
    yield from _chunk(b"IEND", b"")


def _lines(samples: np.ndarray) -> Iterable[bytes]:
    """Yield filtered rows: filter 1 (Sub, the difference to the pixel on the left) in front of every row."""
    step = 2 * samples.shape[2]
    for top in range(0, len(samples), _ROWS):
        strip = samples[top : top + _ROWS]
        rows = np.ascontiguousarray(strip.astype(">u2")).view(np.uint8).reshape(len(strip), -1)
        lines = np.pad(rows, ((0, 0), (1, 0)), constant_values=1)
        lines[:, 1 + step :] -= rows[:, :-step]
        yield lines.tobytes()


def _chunk(name: bytes, body: bytes) -> tuple[bytes, bytes, bytes]:
    return struct.pack(">I", len(body)) + name, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, Iterator[bytes]]]:
    """Yield the name and the pieces of the body of each chunk; unread pieces are read before the next."""
    file.seek(len(SIGNATURE))
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("a PNG without its end")
        size, name = struct.unpack(">I4s", head)
        body = _body(file, name, size)
        yield name, body
        for _ in body:
            pass
        if name == b"IEND":
            return


def _body(file: BinaryIO, name: bytes, size: int) -> Iterator[bytes]:
    crc = zlib.crc32(name)
    while size:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise ValueError("a PNG without its end")
        crc, size = zlib.crc32(piece, crc), size - len(piece)
        yield piece
    if file.read(4) != struct.pack(">I", crc):
        raise ValueError(f"a damaged PNG chunk {name!r}")
