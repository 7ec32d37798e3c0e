"""Image files: every mode and depth comes back as it was."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageOps
from small_images import BANDS, ICC, SIZE, exif_of, png, png16, png_of_every_filter, samples, save, stacked

from edgedyn.errors import ImageError
from edgedyn.images.photo import _UPRIGHT, read_image, write_image

FILES = [
    (".png", np.uint8),
    (".png", np.uint16),
    (".tif", np.uint8),
    (".tif", np.uint16),
    (".tif", np.float32),
]


@pytest.mark.parametrize("mode", BANDS)
@pytest.mark.parametrize(("suffix", "dtype"), FILES, ids=lambda v: getattr(v, "__name__", v))
def test_every_sample_is_read_exactly_and_written_back_exactly(tmp_path, mode, suffix, dtype):
    array = samples(BANDS[mode], dtype)
    save(tmp_path / f"in{suffix}", array)
    photo = read_image(tmp_path / f"in{suffix}")
    scale = 1 if dtype == np.float32 else np.iinfo(dtype).max
    # One rounding of the quotient to float32: half of eps relative to values up to 1.
    np.testing.assert_allclose(stacked(photo), array / scale, rtol=0, atol=np.finfo(np.float32).eps / 2)
    assert (photo.mode, photo.depth, photo.format) == (
        mode,
        8 * array.itemsize,
        suffix[1:].upper() + "F" * (suffix == ".tif"),
    )
    write_image(photo, photo.pixels, tmp_path / f"out{suffix}")
    again = read_image(tmp_path / f"out{suffix}")
    assert np.array_equal(stacked(again), stacked(photo))
    assert (again.mode, again.depth) == (photo.mode, photo.depth)


@pytest.mark.parametrize(("bands", "colour"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_16_bit_png_of_every_filter_is_read_exactly(tmp_path, bands, colour):
    array = samples(bands, np.uint16)
    (tmp_path / "in.png").write_bytes(png_of_every_filter(array, colour))
    photo = read_image(tmp_path / "in.png")
    assert np.array_equal(np.rint(stacked(photo) * 65535), array)


def test_interlaced_16_bit_png_is_read_exactly(tmp_path):
    array = samples(3, np.uint16)
    rows = b""
    # Adam7: first column and row, and their steps, of each pass (PNG specification, section 8.2).
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        rows += b"".join(b"\0" + row.astype(">u2").tobytes() for row in array[y::dy, x::dx] if row.size)
    head = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 1)
    (tmp_path / "in.png").write_bytes(png([(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]))
    assert np.array_equal(np.rint(read_image(tmp_path / "in.png").pixels * 65535), array)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_written_16_bit_png_is_read_by_another_reader(tmp_path, bands):
    array = samples(bands, np.uint16)
    save(tmp_path / "in.png", array)
    with Image.open(tmp_path / "in.png") as image:
        image.load()
        seen = np.asarray(image).reshape(*SIZE, -1)
    if bands == 1:
        assert np.array_equal(seen, array)
    else:  # Pillow keeps the high byte; of gray with alpha it makes R = G = B.
        high = (array >> 8)[:, :, [0, 0, 0, 1] if bands == 2 else slice(None)]
        assert np.array_equal(seen, high if seen.shape[2] == high.shape[2] else (array >> 8))


def test_palettes_become_colour_and_one_bit_becomes_gray(tmp_path):
    colour = Image.fromarray(samples(3, np.uint8))
    palette = colour.quantize(16)
    palette.save(tmp_path / "palette.png")
    photo = read_image(tmp_path / "palette.png")
    assert photo.mode == "P"
    assert np.array_equal(np.rint(photo.pixels * 255), np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "clear.png", transparency=int(np.asarray(palette)[0, 0]))
    alpha = read_image(tmp_path / "clear.png").alpha
    assert np.array_equal(alpha == 0, np.asarray(palette) == np.asarray(palette)[0, 0])
    colour.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png").pixels)) == {0, 1}


def test_a_transparent_colour_becomes_alpha_in_8_bits_and_is_refused_in_16(tmp_path):
    array = samples(3, np.uint8)
    Image.fromarray(array).save(tmp_path / "in.png", transparency=tuple(int(v) for v in array[2, 3]))
    photo = read_image(tmp_path / "in.png")
    assert photo.alpha is not None
    assert photo.alpha[2, 3] == 0
    assert photo.alpha.sum() == array[:, :, 0].size - 1
    deep = png_of_every_filter(samples(3, np.uint16), 2)
    extra = png([(b"tRNS", bytes(6))])[8:]
    (tmp_path / "deep.png").write_bytes(deep[:33] + extra + deep[33:])
    with pytest.raises(ImageError, match="tRNS"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("orientation", sorted(_UPRIGHT))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_orientation_is_applied_once_and_its_tag_dropped(tmp_path, orientation, suffix):
    Image.fromarray(samples(3, np.uint8)).save(
        tmp_path / f"in{suffix}", exif=exif_of(orientation), icc_profile=ICC
    )
    with Image.open(tmp_path / f"in{suffix}") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    photo = read_image(tmp_path / f"in{suffix}")
    assert np.array_equal(np.rint(photo.pixels * 255), upright)
    write_image(photo, photo.pixels, tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as image:
        exif, details = image.getexif(), image.getexif().get_ifd(ExifTags.IFD.Exif)
        assert image.size == upright.shape[1::-1]
        assert ExifTags.Base.Orientation not in exif
        assert exif[ExifTags.Base.Make] == "Camera maker"
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
        size = (details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight])
        assert size == image.size
        assert image.info["icc_profile"] == ICC


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_of_separate_planes_is_read_exactly(tmp_path, dtype):
    array = samples(3, dtype)
    planes = np.moveaxis(array, 2, 0)
    tifffile.imwrite(tmp_path / "in.tif", planes, photometric="rgb", planarconfig="separate")
    photo = read_image(tmp_path / "in.tif")
    assert np.array_equal(np.rint(photo.pixels * np.iinfo(dtype).max), array)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_colours_of_associated_alpha_are_divided_by_it(tmp_path, dtype):
    full = 1.0 if dtype == np.float32 else 65535.0
    alpha = np.array([[0.0, 0.25, 0.5, 1.0]])
    colour = np.array([0.25, 0.5, 1.0])
    premultiplied = np.dstack([colour * alpha[..., None], alpha]) * full
    tifffile.imwrite(
        tmp_path / "in.tif", premultiplied.astype(dtype), photometric="rgb", extrasamples=["assocalpha"]
    )
    photo = read_image(tmp_path / "in.tif")
    expected = np.where(alpha[..., None] > 0, colour, 0.0)
    np.testing.assert_allclose(photo.pixels, expected, rtol=0, atol=4 / 65535)
    np.testing.assert_allclose(photo.alpha, alpha, rtol=0, atol=1 / 65535)
    write_image(photo, photo.pixels, tmp_path / "out.tif")
    again = read_image(tmp_path / "out.tif")
    np.testing.assert_allclose(again.pixels, photo.pixels, rtol=0, atol=1 / 65535)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_colour_above_its_associated_alpha_is_white(tmp_path, dtype):
    full = 1.0 if dtype == np.float32 else 65535.0
    array = (np.array([[[0.25, 0.5, 0.75, 0.5], [0.2, 0.2, 0.2, 0.7]]]) * full).astype(dtype)
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb", extrasamples=["assocalpha"])
    expected = [[[0.5, 1, 1], [2 / 7] * 3]]
    np.testing.assert_allclose(read_image(tmp_path / "in.tif").pixels, expected, rtol=0, atol=2 / 65535)


def test_an_extra_band_of_unknown_meaning_is_refused(tmp_path):
    array = samples(4, np.uint16)
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(ImageError, match="extra band of unspecified meaning"):
        read_image(tmp_path / "in.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_orientation_of_a_tiff_is_applied_once(tmp_path, dtype, orientation):
    array = samples(3, dtype)
    tag = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb", extratags=tag, iccprofile=ICC)
    photo = read_image(tmp_path / "in.tif")
    assert np.array_equal(np.rint(photo.pixels * np.iinfo(dtype).max), _UPRIGHT[orientation](array))
    write_image(photo, photo.pixels, tmp_path / "out.tif")
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert 274 not in file.pages[0].tags
        assert file.pages[0].iccprofile == ICC


def test_16_bit_png_keeps_profile_exif_and_orientation(tmp_path):
    exif = exif_of(6).tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "in.png").write_bytes(png16(samples(3, np.uint16), ICC, exif))
    photo = read_image(tmp_path / "in.png")
    assert np.array_equal(np.rint(photo.pixels * 65535), _UPRIGHT[6](samples(3, np.uint16)))
    write_image(photo, photo.pixels, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["icc_profile"] == ICC
        assert dict(image.getexif()).keys() >= {ExifTags.Base.Make}
        assert ExifTags.Base.Orientation not in image.getexif()


@pytest.mark.parametrize("bands", [1, 3])
def test_jpeg_is_written_in_its_colour_mode_with_full_colour_resolution(tmp_path, bands):
    ramp = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(*SIZE, 1).repeat(bands, 2).astype(np.uint8)
    save(tmp_path / "in.jpeg", ramp)
    photo = read_image(tmp_path / "in.jpeg")
    write_image(photo, photo.pixels, tmp_path / "out.jpeg")
    with Image.open(tmp_path / "out.jpeg") as image:
        assert image.mode == {1: "L", 3: "RGB"}[bands]
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}
        assert image.quantization[0][0] == 2  # of quality 95: round(16 * 0.1), by libjpeg's table


def test_of_a_phones_multi_picture_jpeg_the_main_one_is_read(tmp_path):
    first, second = (Image.fromarray(samples(3, np.uint8, seed)) for seed in (1, 2))
    first.save(tmp_path / "in.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "in.jpg") as image:
        assert image.n_frames == 2
        expected = np.asarray(image)
    photo = read_image(tmp_path / "in.jpg")
    assert np.array_equal(np.rint(photo.pixels * 255), expected)
    assert photo.format == "JPEG"


def test_values_are_clipped_and_rounded_to_the_nearest(tmp_path):
    save(tmp_path / "in.png", samples(1, np.uint8))
    photo = read_image(tmp_path / "in.png")
    values = np.zeros_like(photo.pixels)
    values.flat[:5] = [-1, 2, 0.4 / 255, 0.6 / 255, 254.6 / 255]
    write_image(photo, values, tmp_path / "out.png")
    written = np.asarray(Image.open(tmp_path / "out.png")).ravel()
    assert written[:5].tolist() == [0, 255, 0, 1, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_of_a_tiff_with_a_preview_in_front_the_photo_is_read(tmp_path, dtype):
    array = samples(3, dtype)
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        file.write(array[::2, ::2], photometric="rgb", subfiletype=1)
        file.write(array, photometric="rgb", subfiletype=0, iccprofile=ICC, extratags=[(274, 3, 1, 3, True)])
    photo = read_image(tmp_path / "in.tif")
    assert np.array_equal(np.rint(photo.pixels * np.iinfo(dtype).max), array[::-1, ::-1])
    assert photo.icc == ICC


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0", b"xx"])
def test_damaged_exif_is_left_out_with_a_note(tmp_path, suffix, exif):
    array = samples(3, np.uint8)
    Image.fromarray(array).save(
        tmp_path / f"in{suffix}", exif=exif, **({"lossless": True} if suffix == ".webp" else {})
    )
    photo = read_image(tmp_path / f"in{suffix}")
    assert np.array_equal(np.rint(photo.pixels * 255), array)
    assert photo.exif is None
    assert photo.notes == ("its EXIF data is damaged, and is left out",)
    write_image(photo, photo.pixels, tmp_path / "out.png")
    assert not Image.open(tmp_path / "out.png").getexif()
