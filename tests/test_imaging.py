"""Image files: every mode and depth comes back as it was, and what is not a picture is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps

from edgedyn.errors import EdgedynError, ImageError, UsageError
from edgedyn.imaging import _UPRIGHT, _png16, read_image, write_image

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
        path.write_bytes(_png16(array, None, None))
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


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera maker"
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight] = SIZE[1], SIZE[0]
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


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
    (tmp_path / "in.png").write_bytes(_png16(samples(3, np.uint16), ICC, exif))
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


def encoded(array, form, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


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
    "text": (b"hello world", "expected PNG, JPEG or TIFF"),
    "gif": (encoded(RGB8, "GIF"), "expected PNG, JPEG or TIFF"),
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
    "tiff_bands": (tiff(np.zeros((4, 5, 6), np.uint16), photometric="rgb", planarconfig="contig"), "6 bands"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_picture_is_refused(tmp_path, name):
    data, message = NOT_IMAGES[name]
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / "in")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_is_refused_by_its_name(tmp_path, suffix):
    Image.fromarray(RGB8).convert("CMYK").save(tmp_path / f"in{suffix}")
    with pytest.raises(ImageError, match="colour mode CMYK"):
        read_image(tmp_path / f"in{suffix}")


def test_an_animation_is_refused(tmp_path):
    frames = [Image.fromarray(samples(3, np.uint8, seed)) for seed in (1, 2)]
    frames[0].save(tmp_path / "in.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="animation"):
        read_image(tmp_path / "in.png")


def test_directories_and_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ImageError, match="whole image file"):
            read_image(path)


WHOLE = {
    "png8": encoded(samples(3, np.uint8), "PNG"),
    "png16": _png16(samples(3, np.uint16), ICC, None),
    "jpeg": encoded(samples(3, np.uint8), "JPEG", exif=exif_of(6)),
    "tiff8": encoded(samples(3, np.uint8), "TIFF", compression="tiff_lzw"),
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about EXIF entries that it skips
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
    with pytest.raises(ImageError, match=r"suffix '\.webp', expected one of \.png"):
        write_image(photo, photo.pixels, tmp_path / "out.webp")
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
