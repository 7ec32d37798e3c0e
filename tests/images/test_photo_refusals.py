"""Files that are no picture, damaged, or cannot hold the photo are refused; no other exception escapes."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_images import ICC, encoded, exif_of, png, png16, samples, save, tiff

from edgedyn.errors import EdgedynError, ImageError, UsageError
from edgedyn.images.photo import read_image, write_image


def bomb():
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 16, 2, 0, 0, 0)
    return png([(b"IHDR", head), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")])


def tiff_of_width(width):
    data = bytearray(tiff(np.zeros((4, 5, 3), np.uint16), photometric="rgb"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        place = file.pages[0].tags[256].valueoffset
    struct.pack_into("<I", data, place, width)
    return bytes(data)


RGB8, GRAY16 = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint16)

FLOATS = np.full((4, 5), 0.5, np.float32)

NOT_IMAGES = {
    "empty": (b"", "no bytes"),
    "text": (b"hello world", "expected PNG, JPEG, TIFF, WebP"),
    "jpeg2000": (encoded(RGB8, "JPEG2000"), "expected PNG, JPEG, TIFF, WebP"),
    "zero_width": (png([(b"IHDR", struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0)), (b"IEND", b"")]), "found"),
    "bomb": (bomb(), "exceeds limit"),
    "tiff_bomb": (tiff_of_width(2**31 - 1), "pixels"),
    "tiff_nan": (tiff(np.where(np.eye(4, 5) > 0, np.nan, FLOATS).astype(np.float32)), "not a number"),
    "tiff_inf": (tiff(np.where(np.eye(4, 5) > 0, np.inf, FLOATS).astype(np.float32)), "not in .0, 1"),
    "tiff_negative": (tiff(-FLOATS), "not in .0, 1"),
    "tiff_255": (tiff(255 * FLOATS), "not in .0, 1"),
    "tiff_int32": (tiff(GRAY16.astype(np.int32)), "int32"),
    "tiff_float64": (tiff(FLOATS.astype(np.float64)), "float64"),
    "tiff_pages": (tiff(np.zeros((3, 4, 5), np.uint16), photometric="minisblack"), "3 pages"),
    "tiff_cmyk_16": (tiff(np.zeros((4, 5, 4), np.uint16), photometric="separated"), "SEPARATED"),
    "tiff_miniswhite": (tiff(GRAY16, photometric="miniswhite"), "MINISWHITE"),
    "tiff_lzw_16": (
        encoded(GRAY16, "TIFF", compression="tiff_lzw"),
        "compression LZW.*pip install imagecodecs",
    ),
    "tiff_zstd_16": (
        encoded(GRAY16, "TIFF", compression="zstd"),
        "compression ZSTD.*pip install imagecodecs",
    ),
    "damaged_header": (
        png([(b"IDAT", b""), (b"IEND", b"")]),
        r"found a damaged header, expected a whole image file\. Check",
    ),
    "tiff_bands": (tiff(np.zeros((4, 5, 6), np.uint16), photometric="rgb", planarconfig="contig"), "6 bands"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_picture_is_refused(tmp_path, name):
    data, message = NOT_IMAGES[name]
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / "in")


def test_a_colour_mode_that_is_no_photo_is_refused_by_its_name(tmp_path):
    Image.new("LAB", (5, 4)).save(tmp_path / "in.tif")
    with pytest.raises(ImageError, match="colour mode LAB"):
        read_image(tmp_path / "in.tif")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".avif"])
def test_an_animation_is_refused(tmp_path, suffix):
    frames = [Image.fromarray(samples(3, np.uint8, seed)) for seed in (1, 2)]
    frames[0].save(tmp_path / f"in{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="animation"):
        read_image(tmp_path / f"in{suffix}")


def test_directories_and_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ImageError, match="whole image file"):
            read_image(path)


WHOLE = {
    "png8": encoded(samples(3, np.uint8), "PNG"),
    "png16": png16(samples(3, np.uint16), ICC, None),
    "jpeg": encoded(samples(3, np.uint8), "JPEG", exif=exif_of(6)),
    "tiff8": encoded(samples(3, np.uint8), "TIFF", compression="tiff_lzw"),
    "webp": encoded(samples(3, np.uint8), "WEBP"),
    "bmp": encoded(samples(3, np.uint8), "BMP"),
    "gif": encoded(samples(3, np.uint8), "GIF"),
    "avif": encoded(samples(3, np.uint8), "AVIF"),
    "tiff16": tiff(samples(3, np.uint16), photometric="rgb", compression="adobe_deflate", iccprofile=ICC),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, name):
    data = WHOLE[name]
    (tmp_path / "in").write_bytes(data)
    read_image(tmp_path / "in")
    # Readers may do without the last bytes: JPEG's end marker, the padding of a TIFF.
    for size in np.linspace(0, len(data) - 16, 60).astype(int):
        (tmp_path / "in").write_bytes(data[:size])
        with pytest.raises(ImageError):
            read_image(tmp_path / "in")


@pytest.mark.parametrize("name", ["png8", "png16"])
def test_a_flip_of_any_byte_of_a_png_is_refused(tmp_path, name):
    for place in range(len(WHOLE[name])):
        data = bytearray(WHOLE[name])
        data[place] ^= 1
        (tmp_path / "in").write_bytes(data)
        with pytest.raises(ImageError):
            read_image(tmp_path / "in")


@pytest.mark.filterwarnings("error")  # Pillow's, about EXIF entries that it skips, are none of the user's
@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_read_or_refused_and_nothing_else_escapes(tmp_path, name):
    rng = np.random.default_rng(7)
    refused = 0
    for place in rng.choice(len(WHOLE[name]), 120, replace=False):
        data = bytearray(WHOLE[name])
        data[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "in").write_bytes(data)
        try:
            read_image(tmp_path / "in")
        except ImageError:
            refused += 1
    assert refused > 0


def test_a_format_that_cannot_hold_the_photo_is_refused(tmp_path):
    save(tmp_path / "alpha.png", samples(4, np.uint8))
    save(tmp_path / "deep.png", samples(3, np.uint16))
    save(tmp_path / "float.tif", samples(3, np.float32))
    for source, result in (("alpha.png", "out.jpg"), ("deep.png", "out.jpg"), ("float.tif", "out.png")):
        photo = read_image(tmp_path / source)
        with pytest.raises(ImageError, match="can hold"):
            write_image(photo, photo.pixels, tmp_path / result)
    with pytest.raises(ImageError, match=r"suffix '\.gif', expected one of \.png"):
        write_image(photo, photo.pixels, tmp_path / "out.gif")
    assert sorted(os.listdir(tmp_path)) == ["alpha.png", "deep.png", "float.tif"]


def test_pixels_of_another_shape_or_not_finite_are_refused(tmp_path):
    save(tmp_path / "in.png", samples(3, np.uint8))
    photo = read_image(tmp_path / "in.png")
    for pixels in (photo.pixels[:, :-1], photo.pixels[:, :, :1], photo.pixels * np.float32("nan")):
        with pytest.raises(ImageError, match="all finite"):
            write_image(photo, pixels, tmp_path / "out.png")


def test_a_file_that_cannot_be_written_leaves_no_part_and_the_old_one(tmp_path):
    save(tmp_path / "in.png", samples(3, np.uint8))
    photo = read_image(tmp_path / "in.png")
    (tmp_path / "out.png").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        write_image(photo, photo.pixels, tmp_path / "out.png")
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]
    assert issubclass(UsageError, EdgedynError)


@pytest.mark.parametrize(("mode", "is_read"), [("1", False), ("L", True)])
def test_file_of_a_few_bytes_with_a_flood_of_pixels_is_refused(tmp_path, mode, is_read):
    Image.new(mode, (4100, 4100)).save(tmp_path / "a.png", optimize=True)  # 8000 and 1000 pixels per byte
    if is_read:
        assert read_image(tmp_path / "a.png").shape == (4100, 4100, 1)
        return
    with pytest.raises(
        ImageError, match=r"found 4100 x 4100 pixels in \d+ bytes, expected at most 2000 per byte"
    ):
        read_image(tmp_path / "a.png")
