"""Packed Bayer: raw frames of every pattern, photos packed, arrays of four channels."""

from __future__ import annotations

import numpy as np
import pytest
from small_sets import RAW, entry, save_image, waves, write_set

from edgedyn.images.bayer import RawSection, pack_photo, read_packed_bayer, to_rgb
from edgedyn.images.image_set import open_set
from edgedyn.images.pixels import to_pixels, with_channels

SHAPE = (1, 4, 16, 16)


@pytest.mark.parametrize(
    ("pattern", "order"),
    [("RGGB", (0, 1, 2, 3)), ("BGGR", (3, 2, 1, 0)), ("GRBG", (1, 0, 3, 2)), ("GBRG", (2, 3, 0, 1))],
)
def test_planes_are_red_green_of_its_row_green_of_the_blue_row_and_blue(tmp_path, pattern, order):
    """``order`` has the place of each plane in a 2 x 2 cell, row by row."""
    raw = RawSection(**{**RAW, "pattern": pattern})
    values = np.random.default_rng(0).integers(64, 961, (raw.height, raw.width), dtype=np.uint16)
    file = tmp_path / "a.raw"
    file.write_bytes(values.astype("<u2").tobytes())
    packed = read_packed_bayer(file, raw)
    for plane, place in enumerate(order):
        cell = values[place // 2 :: 2, place % 2 :: 2]
        np.testing.assert_allclose(packed[:, :, plane], (cell - 64.0) / 896, rtol=1e-6, atol=1e-7)


def test_a_photo_is_linear_and_keeps_one_colour_per_photosite():
    photo = np.random.default_rng(0).uniform(0, 1, (5, 7, 3)).astype(np.float32)
    packed = pack_photo(photo)
    assert packed.shape == (2, 3, 4)
    sites = [photo[0:4:2, 0:6:2, 0], photo[0:4:2, 1:6:2, 1], photo[1:4:2, 0:6:2, 1], photo[1:4:2, 1:6:2, 2]]
    for plane, encoded in enumerate(sites):
        linear = packed[:, :, plane].astype(float)
        again = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        np.testing.assert_allclose(again, encoded, atol=1e-5)


def test_white_and_black_stay():
    photo = np.zeros((2, 2, 3), np.float32)
    np.testing.assert_array_equal(pack_photo(photo), 0)
    np.testing.assert_allclose(pack_photo(photo + 1), 1, rtol=1e-6)


def test_packed_planes_become_rgb_and_gray():
    packed = np.array([[[0.1, 0.2, 0.4, 0.8]]], np.float32)
    np.testing.assert_allclose(to_rgb(packed), [[[0.1, 0.3, 0.8]]], rtol=1e-6)
    np.testing.assert_allclose(with_channels(packed, 1), [[[0.4]]], rtol=1e-6)
    assert with_channels(np.ones((4, 6, 1), np.float32), 4).shape == (2, 3, 4)


def test_an_array_of_four_channels_is_packed_bayer():
    planes = np.random.default_rng(0).uniform(0, 1, (4, 10, 12)).astype(np.float32)
    np.testing.assert_array_equal(to_pixels(planes, "x"), planes.transpose(1, 2, 0))
    np.testing.assert_array_equal(to_pixels(planes.transpose(1, 2, 0), "x"), planes.transpose(1, 2, 0))


def test_samples_of_four_channels_are_crops_of_the_packed_photo_with_the_noise_behind(tmp_path):
    path = write_set(tmp_path, names=("a.png",), samples=1, noise={"kind": "none"})
    (sample,) = open_set(path).draw([(1, 4, 45, 35)])
    expected = pack_photo(waves(0).astype(np.float32) / 255)
    np.testing.assert_array_equal(sample.noisy[0].transpose(1, 2, 0), expected)
    noise = {"kind": "poisson-gaussian", "gain": [0.01], "read_noise": [0.002], "clip": False}
    (noisy,) = open_set(write_set(tmp_path, names=("a.png",), samples=1, noise=noise)).draw([(1, 4, 45, 35)])
    np.testing.assert_array_equal(noisy.truth[0].transpose(1, 2, 0), expected)
    error = (noisy.noisy - noisy.truth).astype(float)
    assert np.mean(error**2) == pytest.approx(0.01 * expected.mean() + 0.002**2, rel=0.1)


def test_raw_frames_keep_their_own_planes(tmp_path):
    y, x = np.mgrid[: RAW["height"], : RAW["width"]]
    file = tmp_path / "a.raw"
    file.write_bytes((500 + 300 * np.sin((x + 2 * y) / 7)).astype("<u2").tobytes())
    path = write_set(tmp_path, names=(), raw=RAW, noise={"kind": "real"}, files=[entry(file)])
    drawn = list(open_set(path).draw([SHAPE]))
    packed = read_packed_bayer(file, RawSection(**RAW))
    windows = np.lib.stride_tricks.sliding_window_view(packed, (16, 16), axis=(0, 1))
    assert (windows == drawn[0].noisy[0]).all(axis=(2, 3, 4)).any()
    assert not drawn[0].has_truth
    save_image(tmp_path / "b.png")  # a photo beside raw frames is packed, too
    path = write_set(tmp_path, names=(), raw=RAW, files=[entry(file), entry(tmp_path / "b.png")])
    assert {sample.noisy.shape for sample in open_set(path).draw([SHAPE])} == {SHAPE}
