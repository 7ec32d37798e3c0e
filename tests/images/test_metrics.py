"""Metrics against values by hand, against scikit-image, and their refusals."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from edgedyn.errors import UsageError
from edgedyn.images import metrics

EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(scope="module")
def pair():
    """An image with H != W, no multiple of the tile, and the same with noise of 25 levels, unclipped."""
    truth = (skimage.data.astronaut()[30:180, 100:333] / 255).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 25 / 255, truth.shape)
    return (truth + noise).astype(np.float32), truth


def test_psnr_of_an_offset_is_its_square_by_hand():
    truth = np.zeros((3, 5, 2))
    within = 150 * EPS  # -10 log10(0.01): a sum of 30 terms, each rounding 10 / ln 10 = 4.3 eps in dB
    assert metrics.psnr_db(truth + 0.1, truth) == pytest.approx(20, abs=within)
    assert metrics.psnr_db(truth + 25.5, truth, high=255) == pytest.approx(20, abs=within)


def test_psnr_equals_scikit_image_in_float64(pair):
    y, truth = (a.astype(np.float64) for a in pair)
    theirs = peak_signal_noise_ratio(truth, y, data_range=1)
    assert metrics.psnr_db(y, truth) == pytest.approx(
        theirs, abs=truth.size * EPS
    )  # worst case of one long sum
    assert 19.9 < theirs < 20.4  # 20 log10(255 / 25) = 20.17: the noise has this level


def test_psnr_of_float32_is_summed_in_float64(pair):
    y, truth = pair
    assert metrics.psnr_db(y, truth) == metrics.psnr_db(y.astype(np.float64), truth.astype(np.float64))


def test_ssim_equals_scikit_image_with_the_published_setting(pair):
    y, truth = (a.astype(np.float64) for a in pair)
    setting = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    theirs = structural_similarity(truth, y, channel_axis=2, **setting)
    assert metrics.ssim(y, truth) == pytest.approx(theirs, abs=truth.size * EPS)
    assert theirs != pytest.approx(structural_similarity(truth, y, channel_axis=2, data_range=1), abs=1e-3)


def test_ssim_of_two_constants_is_the_luminance_term_by_hand():
    a, b, c1 = 0.25, 0.75, 0.01**2  # K1 = 0.01; variances are 0, so contrast and structure are 1
    shape = (11, 13, 1)
    by_hand = (2 * a * b + c1) / (a * a + b * b + c1)
    # Variances come out as E[x^2] - E[x]^2 with about 100 roundings of values below 1, over C2 = 0.03^2.
    assert metrics.ssim(np.full(shape, a), np.full(shape, b)) == pytest.approx(
        by_hand, abs=100 * EPS / 0.03**2
    )


def test_ssim_averages_channels(pair):
    y, truth = pair
    single = [metrics.ssim(y[..., c : c + 1], truth[..., c : c + 1]) for c in range(3)]
    assert metrics.ssim(y, truth) == pytest.approx(sum(single) / 3, abs=8 * EPS)
    assert max(single) - min(single) > 1e-4


def test_sqnr_by_hand_and_its_reference_is_the_second_argument():
    y, reference = np.array([1.1, -2.2, 3.3]), np.array([1.0, -2.0, 3.0])
    assert metrics.sqnr_db(y, reference) == pytest.approx(
        20, abs=1000 * EPS
    )  # the cancellation 1.1 - 1 costs 11 eps
    assert metrics.sqnr_db(reference, y) == pytest.approx(20 * math.log10(11), abs=1000 * EPS)


def test_sqnr_does_not_depend_on_scale(pair):
    y, truth = (a.astype(np.float64) for a in pair)
    assert metrics.sqnr_db(8 * y, 8 * truth) == metrics.sqnr_db(y, truth)  # a power of two rounds nowhere


def test_sqnr_against_a_zero_reference_is_minus_infinity():
    assert metrics.sqnr_db(np.ones(3), np.zeros(3)) == -math.inf


def test_max_abs_finds_the_one_place_of_either_sign():
    reference = np.arange(12.0).reshape(2, 3, 2)
    y = reference.copy()
    y[1, 2, 0] -= 0.5
    assert metrics.max_abs(y, reference) == 0.5


def test_mean_abs_levels_of_one_grey_level_in_half_of_the_pixels():
    reference = np.zeros((4, 6, 1))
    y = reference.copy()
    y[:2], y[2:] = 1 / 255, 0
    assert metrics.mean_abs_levels(y, reference) == pytest.approx(0.5, abs=32 * EPS)


def test_worst_tile_is_the_damaged_one():
    truth = np.zeros((128, 192, 3))
    y = truth + 0.001
    y[64:128, 128:192] = 0.1
    # 12288 equal terms added pairwise round 14 times, each 10 / ln 10 = 4.3 eps in dB; 20 itself has 16 eps.
    assert metrics.worst_tile_psnr_db(y, truth) == pytest.approx(20, abs=80 * EPS)
    assert metrics.psnr_db(y, truth) > 27


@pytest.mark.parametrize("place", [(129, 5), (5, 191), (129, 191)], ids=["lower", "right", "corner"])
def test_rests_at_the_border_are_tiles_of_their_own(place):
    truth = np.zeros((130, 192, 1))
    y = truth.copy()
    y[place] = 1
    rest_h = 2 if place[0] >= 128 else 64
    assert metrics.worst_tile_psnr_db(y, truth) == pytest.approx(10 * math.log10(rest_h * 64), abs=64 * EPS)


def test_worst_tile_reads_its_side():
    truth = np.zeros((8, 8, 1))
    y = truth.copy()
    y[0, 0] = 1
    assert metrics.worst_tile_psnr_db(y, truth, tile=4) == pytest.approx(10 * math.log10(16), abs=64 * EPS)


def test_one_tile_larger_than_the_image_is_the_image(pair):
    y, truth = pair
    assert metrics.worst_tile_psnr_db(y, truth, tile=1000) == metrics.psnr_db(y, truth)


IDENTICAL = {
    "psnr_db": math.inf,
    "ssim": 1.0,
    "sqnr_db": math.inf,
    "max_abs": 0.0,
    "mean_abs_levels": 0.0,
    "worst_tile_psnr_db": math.inf,
}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_identical_images_are_the_best_value(name, pair):
    _, truth = pair
    assert metrics.METRICS[name](truth, truth.copy()) == pytest.approx(IDENTICAL[name], abs=8 * EPS)


def test_discovery_finds_the_public_functions_and_nothing_else():
    assert set(metrics.METRICS) == set(IDENTICAL)
    assert all(inspect.getdoc(function) for function in metrics.METRICS.values())


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("side", [0, 1], ids=["first", "second"])
def test_one_value_that_is_no_number_is_refused(name, bad, side, pair):
    arrays = [pair[0].copy(), pair[1].copy()]
    arrays[side][3, 4, 1] = bad
    with pytest.raises(UsageError, match=rf"{name} got 1 of \d+ values that are NaN or infinite"):
        metrics.METRICS[name](*arrays)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_unequal_shapes_are_refused_even_where_numpy_would_broadcast(name):
    with pytest.raises(UsageError, match=rf"{name} got shapes \(16, 16, 3\) and \(16, 16, 1\)"):
        metrics.METRICS[name](np.zeros((16, 16, 3)), np.zeros((16, 16, 1)))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_empty_arrays_are_refused(name):
    with pytest.raises(UsageError, match=rf"{name} got empty arrays of shape \(0, 16, 3\)"):
        metrics.METRICS[name](np.zeros((0, 16, 3)), np.zeros((0, 16, 3)))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_arrays_of_no_real_numbers_are_refused(name):
    with pytest.raises(UsageError, match=rf"{name} got dtype complex128"):
        metrics.METRICS[name](np.zeros((16, 16, 3), complex), np.zeros((16, 16, 3), complex))


@pytest.mark.parametrize("name", ["ssim", "worst_tile_psnr_db"])
def test_a_batch_is_no_image(name):
    with pytest.raises(UsageError, match=rf"{name} got shape \(1, 3, 16, 16\); expected \(H, W, C\)"):
        metrics.METRICS[name](np.zeros((1, 3, 16, 16)), np.zeros((1, 3, 16, 16)))


def test_an_image_below_the_window_of_ssim_is_refused():
    with pytest.raises(UsageError, match="H and W at least 11"):
        metrics.ssim(np.zeros((11, 10, 3)), np.zeros((11, 10, 3)))


@pytest.mark.parametrize("high", [0, -1, math.nan, math.inf])
def test_psnr_refuses_a_peak_that_is_no_peak(high):
    with pytest.raises(UsageError, match="high="):
        metrics.psnr_db(np.zeros(3), np.zeros(3), high=high)


def test_a_tile_of_no_pixels_is_refused():
    with pytest.raises(UsageError, match="tile=0"):
        metrics.worst_tile_psnr_db(np.zeros((4, 4, 1)), np.zeros((4, 4, 1)), tile=0)


def test_import_needs_neither_torch_nor_scikit_image():
    code = (
        "import sys, edgedyn.images.metrics; print(sorted({'torch', 'skimage', 'scipy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
