"""Small images of every kind, made without the code under test where another writer exists."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms

from edgedyn.images.png16 import encode

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

SIZE = (13, 7)  # H, W: odd, distinct

BANDS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def samples(bands, dtype, seed=0):
    high = 1 if dtype == np.float32 else np.iinfo(dtype).max
    values = np.random.default_rng(seed).uniform(0, high, (*SIZE, bands))
    values.flat[0], values.flat[-1] = 0, high
    return values.astype(dtype)


def save(path, array, **options):
    if array.dtype == np.uint8 and path.suffix != ".tif":
        Image.fromarray(array.squeeze()).save(path, **options)
    elif path.suffix == ".png":
        path.write_bytes(png16(array))
    else:
        bands = array.shape[2]
        extra = ["unassalpha"] if bands in (2, 4) else None
        colour = "rgb" if bands > 2 else "minisblack"
        planar = "contig" if bands > 1 else None
        tifffile.imwrite(
            path, array.squeeze(), photometric=colour, extrasamples=extra, planarconfig=planar, **options
        )


def stacked(photo):
    return photo.pixels if photo.alpha is None else np.dstack([photo.pixels, photo.alpha])


def paeth(left, up, corner):
    p = left.astype(int) + up - corner
    a, b, c = abs(p - left), abs(p - up), abs(p - corner)
    return np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))


def png_of_every_filter(array, colour):
    """A 16-bit PNG whose rows use filters 0 to 4 in turn (PNG specification, section 9), in two IDATs."""
    height, width, bands = array.shape
    rows = array.astype(">u2").view(np.uint8).reshape(height, -1)
    step = 2 * bands
    left = np.pad(rows, ((0, 0), (step, 0)))[:, :-step]
    up = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(rows, ((1, 0), (step, 0)))[:-1, :-step]
    guesses = [0 * rows, left, up, (left.astype(int) + up) // 2, paeth(left, up, corner)]
    lines = [
        bytes([y % 5]) + ((rows[y] - guesses[y % 5][y].astype(int)) % 256).astype(np.uint8).tobytes()
        for y in range(height)
    ]
    packed = zlib.compress(b"".join(lines))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    chunks += [(b"IDAT", packed[:40]), (b"IDAT", packed[40:]), (b"IEND", b"")]
    return png(chunks)


def png(chunks):
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera maker"
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight] = SIZE[1], SIZE[0]
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


def png16(array, icc=None, exif=None):
    return b"".join(encode(array, icc, exif))


def encoded(array, form, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def ink_profile(lab_of_corner):
    """An ICC profile of CMYK: Lab by linear interpolation between the 16 corners of no and full ink.

    lab_of_corner(c, m, y, k) returns L in [0, 100], a and b for inks of 0 or 1 (ICC.1:2001, lut8Type).
    """
    corners = [tuple(n >> s & 1 for s in (3, 2, 1, 0)) for n in range(16)]
    cells = [
        (round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128) for lab in (lab_of_corner(*c) for c in corners)
    ]
    ramp = bytes(range(256))
    one = [0x10000 * (i % 4 == 0) for i in range(9)]
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9I", *one)
    table += 4 * ramp + bytes(value for cell in cells for value in cell) + 3 * ramp
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    size = 144 + len(table)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0") + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + tags + table
