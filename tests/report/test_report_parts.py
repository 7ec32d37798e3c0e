"""The parts of a report: pictures with what stands under them, and numbers as people write them."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from edgedyn.errors import UsageError
from edgedyn.report.pictures import Picture, panels
from edgedyn.report.text import MINUS, TIMES, megabytes, number


def flat_picture(*, noisy=0.5, float_=0.5, device=0.5, truth=0.5, shape=(6, 10, 3)):
    return Picture("flat", 25, *(np.full(shape, v, np.float32) for v in (noisy, float_, device, truth)))


def decoded(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_captions_carry_psnr_against_the_truth():
    # Offsets of 0.1 and 0.01 are 20 and 40 dB by definition.
    row = panels(flat_picture(noisy=0.6, float_=0.51, device=0.5), "FP16")
    assert [panel["name"] for panel in row] == ["Noisy", "Float", "FP16", f"Difference {TIMES} 10"]
    assert [panel["number"] for panel in row[:3]] == ["20.00 dB", "40.00 dB", "identical to the truth"]
    assert row[0]["note"] == "sigma 25"


def test_the_difference_is_ten_times_device_minus_float_around_grey():
    picture = flat_picture(noisy=0.2, float_=0.5, device=0.5)
    picture.device[2, 7, 1] = 0.52  # 0.5 + 10 * 0.02 = 0.7, which is level 178.5
    picture.device[4, 1, 0] = 0.4  # beyond the scale: black
    noisy, float_, device, difference = (decoded(panel["uri"]) for panel in panels(picture, "INT8"))
    assert noisy.shape == float_.shape == device.shape == difference.shape == (6, 10, 3)
    assert (noisy == 51).all()
    assert difference[2, 7, 1] in (178, 179)
    assert difference[4, 1, 0] == 0
    assert np.count_nonzero(difference != 128) == 2


def test_the_difference_is_captioned_in_grey_levels():
    picture = flat_picture(shape=(4, 4, 1))
    picture.device[0, 0, 0] += 16 / 255
    caption = panels(picture, "INT8")[3]
    assert caption["number"] == "mean 1, largest 16 levels"
    assert caption["note"] == f"INT8 {MINUS} float; grey is zero"


def test_packed_bayer_is_shown_as_rgb_and_measured_as_it_is():
    picture = flat_picture(noisy=0.6, shape=(4, 6, 4))
    picture.device[1, 2, 3] += 0.02  # blue
    noisy, _, device, difference = panels(picture, "INT8")
    assert noisy["number"] == "20.00 dB"
    assert (decoded(noisy["uri"]) == np.rint(255 * 0.6 ** (1 / 2.2))).all()
    assert decoded(device["uri"]).shape == (4, 6, 3)
    changed = np.argwhere(decoded(difference["uri"]) != 128)
    assert changed.tolist() == [[1, 2, 2]]


def test_values_outside_the_range_are_shown_clipped_but_measured():
    noisy = panels(flat_picture(noisy=1.1, truth=1.0), "INT8")[0]
    assert noisy["number"] == "20.00 dB"
    assert (decoded(noisy["uri"]) == 255).all()


def test_grey_pictures_are_shown():
    row = panels(flat_picture(shape=(6, 10, 1)), "INT8")
    assert [decoded(panel["uri"]).shape for panel in row] == [(6, 10)] * 4


@pytest.mark.parametrize("damaged", ["noisy", "float_", "device", "truth"])
def test_pictures_that_cannot_be_compared_are_refused(damaged):
    flat = flat_picture()
    with pytest.raises(UsageError, match="shapes"):
        panels(replace(flat, **{damaged: flat.truth[1:]}), "INT8")
    with pytest.raises(UsageError, match="NaN"):
        panels(flat_picture(**{damaged: math.nan}), "INT8")


def test_channels_first_are_refused():
    with pytest.raises(UsageError, match=r"shape \(3, 6, 10\); expected \(H, W, 1\)"):
        panels(flat_picture(shape=(3, 6, 10)), "INT8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (31.131, "31.13"),
        (-0.5, f"{MINUS}0.5"),
        (1234567.0, "1,234,567"),
        (12345678.0, "1.235e7"),
        (0.00012, f"1.2e{MINUS}4"),
        (0.0012345, "0.001234"),
        (100.0, "100"),
        (math.inf, "∞"),
        (-math.inf, f"{MINUS}∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_read_as_people_write_them(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (1_023_456, "1.02 MB")]
)
def test_sizes_read_as_people_write_them(size, text):
    assert megabytes(size) == text
