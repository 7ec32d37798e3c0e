"""Formats besides PNG, JPEG and TIFF, and CMYK: read for sets and for ``run`` by one reader, written back."""

from __future__ import annotations

import base64
import builtins
import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage.color import lab2rgb
from small_images import ICC, encoded, exif_of, ink_profile
from small_sets import waves

from edgedyn.errors import CalibrationError, ImageError, TargetMissingError
from edgedyn.images.formats import FORMATS, SUFFIXES, av1_bits, identify
from edgedyn.images.photo import check_format, read_image, save, write_image
from edgedyn.images.pixels import SUFFIXES as SET_SUFFIXES
from edgedyn.images.pixels import read_pixels

RGB8 = waves()  # (H, W, 3) uint8, smooth: lossy formats keep it
LOSSLESS = {"BMP": {}, "WEBP": {"lossless": True}}


def near(a, b, levels=0.0):
    """Whether two pictures differ by so many levels of 8 bits on average."""
    return np.abs(a - b).mean() * 255 <= levels


def test_sets_read_every_format_that_run_reads():
    assert SUFFIXES.keys() < SET_SUFFIXES
    assert {SUFFIXES[suffix] for suffix in (".webp", ".bmp", ".gif", ".avif", ".heic")} < FORMATS.keys()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_are_read_bit_for_bit_by_both_readers(tmp_path, kind):
    path = tmp_path / f"in{FORMATS[kind].suffixes[0]}"
    path.write_bytes(encoded(RGB8, kind, **LOSSLESS[kind]))
    photo = read_image(path)
    assert np.array_equal(np.rint(photo.pixels * 255), RGB8)
    assert np.array_equal(read_pixels(path), photo.pixels)
    assert (photo.format, photo.depth, photo.mode) == (kind, 8, "RGB")


# mean levels that the lossy formats change; colours of WebP have half the resolution
LEVELS = {"BMP": 0, "WEBP": 3, "AVIF": 1.5}


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_a_photo_is_written_in_its_own_format_with_its_alpha(tmp_path, kind, bands):
    (tmp_path / "in.png").write_bytes(encoded(np.dstack([RGB8, 255 - RGB8])[:, :, :bands].squeeze(), "PNG"))
    photo = read_image(tmp_path / "in.png")
    path = tmp_path / f"out{FORMATS[kind].suffixes[0]}"
    if kind == "BMP" and bands in (2, 4):
        with pytest.raises(ImageError, match="can hold"):
            save(photo, path)
        return
    save(photo, path)
    again = read_image(path)
    assert near(again.pixels, np.broadcast_to(photo.pixels, again.pixels.shape), LEVELS[kind])
    assert (again.alpha is None) == (bands in (1, 3))
    assert again.alpha is None or near(again.alpha, photo.alpha, LEVELS[kind])


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_profile_and_exif_stay_and_the_picture_is_turned(tmp_path, kind, orientation):
    path = tmp_path / f"in{FORMATS[kind].suffixes[0]}"
    path.write_bytes(encoded(RGB8, kind, quality=95, exif=exif_of(orientation), icc_profile=ICC))
    photo = read_image(path)
    height, width = RGB8.shape[:2]
    assert photo.shape == ((width, height, 3) if orientation == 6 else (height, width, 3))
    out = path.with_stem("out")
    write_image(photo, photo.pixels, out)
    with Image.open(out) as image:
        assert image.info["icc_profile"] == ICC
        assert image.getexif()[271] == "Camera maker"
        assert image.getexif().get(274, 1) == 1
    assert near(read_image(out).pixels, photo.pixels, LEVELS[kind])


def test_the_first_frame_of_a_gif_is_read_and_said_and_a_gif_is_not_written(tmp_path):
    frames = [Image.fromarray(np.full((6, 7, 3), value, np.uint8)) for value in (40, 200)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:])
    photo = read_image(tmp_path / "in.gif")
    assert (np.rint(photo.pixels * 255) == 40).all()
    assert photo.notes == ("the first frame of an animation",)
    with pytest.raises(ImageError, match=r"suffix '\.gif'"):
        check_format(photo, tmp_path / "out.gif")


def cmyk(kind, icc=None):
    image = Image.fromarray(RGB8).convert("CMYK")
    stream = io.BytesIO()
    image.save(stream, kind, icc_profile=icc, **({"quality": 95} if kind == "JPEG" else {}))
    return image, stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_becomes_rgb_and_says_how(tmp_path, kind):
    image, data = cmyk(kind)
    (tmp_path / "in").write_bytes(data)
    photo = read_image(tmp_path / "in")
    assert near(photo.pixels, np.asarray(image.convert("RGB")) / 255, 1 if kind == "JPEG" else 1e-4)
    assert photo.mode == "CMYK"
    assert photo.icc is None
    assert photo.notes == ("CMYK became RGB by a plain formula: it has no colour profile",)


def test_cmyk_with_a_profile_of_another_kind_says_so(tmp_path):
    _, data = cmyk("TIFF", ICC)  # a profile of RGB
    (tmp_path / "in").write_bytes(data)
    photo = read_image(tmp_path / "in")
    assert photo.icc is None
    assert "its colour profile cannot be used" in photo.notes[0]


def test_a_format_is_known_by_its_contents_not_by_its_name(tmp_path):
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "AVIF"):
        data = encoded(RGB8, kind)
        assert identify(data[:64]) == kind
        (tmp_path / "in.png").write_bytes(data)
        assert read_image(tmp_path / "in.png").format == kind
    assert identify(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "HEIF"
    assert identify(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf") == "AVIF"
    assert identify(b"\0\0\0\x18ftypisom\0\0\0\0mp42isom") == ""
    assert identify(b"RIFF\0\0\0\0WAVE") == ""


def test_heic_without_its_package_names_the_command(tmp_path, monkeypatch):
    (tmp_path / "in.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    real = builtins.__import__

    def blocked(name, *rest):
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(TargetMissingError, match=r"pip install 'edgedyn\[heif\]'"):
        read_image(tmp_path / "in.heic")
    with pytest.raises(CalibrationError, match=r"pip install 'edgedyn\[heif\]'"):
        read_pixels(tmp_path / "in.heic")


def test_heic_is_read_turned_with_its_profile(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    pillow_heif.register_heif_opener()
    data = encoded(RGB8, "HEIF", quality=95, exif=exif_of(6).tobytes(), icc_profile=ICC)
    (tmp_path / "in.heic").write_bytes(data)
    photo = read_image(tmp_path / "in.heic")
    assert photo.shape == (RGB8.shape[1], RGB8.shape[0], 3)
    upright = RGB8[::-1].swapaxes(0, 1) / 255
    assert np.abs(photo.pixels - upright).mean() < 0.02
    assert (photo.format, photo.icc) == ("HEIF", ICC)
    for size in np.linspace(0, len(data) - 16, 20).astype(int):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ImageError):
            read_image(tmp_path / "cut")


def lab_of_corner(c, m, y, k):
    return (100 - 20 * c - 25 * m - 5 * y) * (1 - k), (30 * m - 15 * c) * (1 - k), (40 * y - 12 * c) * (1 - k)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_srgb_by_its_profile(tmp_path, kind):
    inks = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    image = Image.fromarray(255 * np.repeat(np.array([inks], np.uint8), 16, 0).repeat(16, 1), mode="CMYK")
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image.save(tmp_path / "in", kind, icc_profile=ink_profile(lab_of_corner), **options)
    photo = read_image(tmp_path / "in")
    expected = lab2rgb(np.array([[lab_of_corner(*ink) for ink in inks]], float))
    np.testing.assert_allclose(photo.pixels[8, 8::16], expected[0], rtol=0, atol=0.04)
    assert photo.notes == ("CMYK became sRGB by its colour profile",)
    assert ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(photo.icc))).strip()
    plain = np.asarray(image.convert("RGB"))[8, 8::16] / 255
    assert np.abs(plain - expected[0]).max() > 0.2, "the plain formula would pass too"


# 8 x 8 ramps, written with imagecodecs 2026 (libavif): Pillow writes AVIF of 8 bits only
_DEEP_AVIF = {
    10: (
        "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAA"
        "AAAAAAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAJAAAAChpaW5mAAAAAAABAAAAGmluZmUC"
        "AAAAAAEAAGF2MDFDb2xvcgAAAABqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCgoKAAAA"
        "DGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAGgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAALG1kYXQSAAoIOAi/bwICBpAy"
        "FhlCYwTAADQAAACQP743H2ZKj+1PWnw="
    ),
    12: (
        "AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAAOttZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAA"
        "AAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAAQ8AAAAkAAAAKGlpbmYAAAAAAAEAAAAaaW5mZQIAAAAA"
        "AQAAYXYwMUNvbG9yAAAAAGppcHJwAAAAS2lwY28AAAAUaXNwZQAAAAAAAAAIAAAACAAAABBwaXhpAAAAAAMMDAwAAAAMYXYx"
        "Q4FAYAAAAAATY29scm5jbHgAAgACAAaAAAAAF2lwbWEAAAAAAAAAAQABBAECgwQAAAAsbWRhdBIACghYCL9rQICBojIWGUJj"
        "BMAANAAAkD+cIxUrBW/PLvSHgA=="
    ),
}


@pytest.mark.parametrize("bits", _DEEP_AVIF)
def test_a_deep_avif_is_reduced_with_a_note(tmp_path, bits):
    path = tmp_path / "in.avif"
    path.write_bytes(base64.b64decode(_DEEP_AVIF[bits]))
    photo = read_image(path)
    assert (photo.depth, photo.shape[:2]) == (8, (8, 8))
    assert photo.pixels[-1, -1].min() > photo.pixels[0, 0].max() + 0.9
    assert photo.notes == (f"{bits} bits per sample were reduced to 8",)


def test_an_avif_of_8_bits_has_no_note(tmp_path):
    (tmp_path / "in.avif").write_bytes(encoded(RGB8, "AVIF"))
    assert read_image(tmp_path / "in.avif").notes == ()
    assert av1_bits(b"") == av1_bits(b"....av1C\x81") == 8
