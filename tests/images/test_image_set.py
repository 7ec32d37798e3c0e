"""Image sets: drawn the same way every time, on the stated scale, and refused when they prove nothing."""

from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sets import (
    NOISE,
    RAW,
    SHAPE,
    digest,
    draw,
    entry,
    refused,
    save_image,
    waves,
    write_pairs,
    write_set,
)

from edgedyn.errors import CalibrationError
from edgedyn.images.disjoint import refuse_overlap
from edgedyn.images.image_set import CalibrationSet, open_set
from edgedyn.images.noise import NoiseSection


def test_draw_is_the_same_every_time_and_follows_the_seed(tmp_path):
    path = write_set(tmp_path)
    first, second = draw(path), draw(path)
    assert len(first) == 5
    for one, two in zip(first, second, strict=True):
        assert one.noisy.tobytes() == two.noisy.tobytes()
        assert one.truth.tobytes() == two.truth.tobytes()
    other = draw(write_set(tmp_path, seed=1))
    assert not any(np.array_equal(a.noisy, b.noisy) for a, b in zip(first, other, strict=True))


def test_samples_have_the_program_shape_and_take_files_and_levels_in_turn(tmp_path):
    samples = draw(write_set(tmp_path, noise={"sigma": [5.0, 20.0, 40.0], "clip": False}))
    for sample in samples:
        assert sample.noisy.shape == sample.truth.shape == SHAPE
        assert sample.noisy.dtype == sample.truth.dtype == np.float32
        assert sample.noisy.flags.c_contiguous
    assert [s.source for s in samples] == ["a.png", "b.png", "a.png", "b.png", "a.png"]
    assert [s.sigma for s in samples] == [5, 20, 20, 40, 40]


@pytest.mark.parametrize("files", [1, 2, 3, 4])
def test_each_file_meets_each_noise_level(tmp_path, files):
    names = tuple("abcd"[:files])
    path = write_set(tmp_path, names=tuple(f"{n}.png" for n in names), samples=3 * files)
    pairs = {(s.source, s.sigma) for s in draw(path)}
    assert len(pairs) == 3 * files


def test_a_large_folder_is_sampled_evenly(tmp_path):
    for index in range(130):
        Image.fromarray(np.full((4, 4), index, np.uint8)).save(tmp_path / f"{index:03}.png")
    found = open_set(tmp_path)
    assert found.samples == len(found.files) == 64
    numbers = [int(path.stem) for path, _ in found.files]
    assert numbers[0] == 0
    assert set(np.diff(numbers)) == {2, 3}


def test_truth_is_a_crop_of_the_file(tmp_path):
    path = write_set(tmp_path, names=("a.png",), samples=1)
    whole = np.asarray(Image.open(tmp_path / "a.png"), dtype=np.float32).transpose(2, 0, 1) / 255
    windows = np.lib.stride_tricks.sliding_window_view(whole, SHAPE[1:])[0]
    errors = np.abs(windows - draw(path)[0].truth[0]).max(axis=(2, 3, 4))
    assert errors.min() <= 2**-24  # one rounding of the division by 255


@pytest.mark.parametrize("sigma", [5.0, 25.0])
def test_sigma_is_on_the_scale_of_8_bit_levels(tmp_path, sigma):
    samples = draw(write_set(tmp_path, samples=24, noise={"sigma": [sigma], "clip": False}), (1, 3, 128, 128))
    noise = np.concatenate([(s.noisy - s.truth).ravel() for s in samples]) * 255
    # standard errors from n normal values: sigma / sqrt(2 n) of a standard deviation, sigma / sqrt(n) of a
    # mean
    assert abs(noise.std() - sigma) < 4 * sigma / np.sqrt(2 * noise.size)  # 0.3 %: 256 would be seen
    assert abs(noise.mean()) < 4 * sigma / np.sqrt(noise.size)


def test_noise_is_clipped_only_where_the_manifest_says_so(tmp_path):
    free, clipped = (
        draw(write_set(tmp_path, noise={"sigma": [200.0], "clip": clip})) for clip in (False, True)
    )
    for one, two in zip(free, clipped, strict=True):
        assert one.noisy.min() < 0
        assert one.noisy.max() > 1
        np.testing.assert_array_equal(two.noisy, one.noisy.clip(0, 1))
        np.testing.assert_array_equal(two.truth, one.truth)


def test_set_without_noise_gives_the_truth(tmp_path):
    for sample in draw(write_set(tmp_path, noise={"kind": "none"})):
        assert sample.sigma == 0
        np.testing.assert_array_equal(sample.noisy, sample.truth)


def test_gray_image_is_repeated_for_a_colour_network(tmp_path):
    save_image(tmp_path / "gray.png", gray=True)
    truth = next(open_set(tmp_path).draw([SHAPE])).truth
    np.testing.assert_array_equal(truth[:, 0], truth[:, 1])
    np.testing.assert_array_equal(truth[:, 0], truth[:, 2])
    assert truth.std() > 0.05


def test_colour_image_is_averaged_for_a_gray_network(tmp_path):
    """The plain average of a pixel's three samples, no luma weights."""
    path = write_set(tmp_path, names=("a.png",), samples=1)
    colour, gray = draw(path)[0].truth, draw(path, (1, 1, *SHAPE[2:]))[0].truth
    np.testing.assert_allclose(
        gray, colour.mean(axis=1, keepdims=True), rtol=0, atol=2**-22
    )  # three roundings


def test_image_smaller_than_the_crop_is_reflected(tmp_path):
    save_image(tmp_path / "small.png", size=(20, 30))
    pixels = np.asarray(Image.open(tmp_path / "small.png"), dtype=np.float32) / 255
    expected = np.pad(pixels, ((0, 12), (0, 18), (0, 0)), mode="symmetric").transpose(2, 0, 1)[None]
    truth = next(open_set(tmp_path).draw([SHAPE])).truth
    np.testing.assert_allclose(truth, expected, rtol=0, atol=2**-24)


def test_folder_of_images_is_a_set_with_the_default_noise(tmp_path):
    for k in range(2):
        save_image(tmp_path / f"{k}.PNG", seed=k)
    (tmp_path / "notes.txt").write_text("not an image")
    opened = open_set(tmp_path)
    assert [path.name for path, _ in opened.files] == ["0.PNG", "1.PNG"]
    assert (opened.licence, opened.samples, opened.noise.sigma) == ("not stated", 12, [15.0, 25.0, 50.0])


def test_vivid_samples_come_after_the_others_in_exchanged_and_saturated_colours(tmp_path):
    """Files are taken as evenly as before; the samples drawn before stay bit-identical."""
    plain = open_set(write_set(tmp_path, noise={**NOISE, "sigma": [25.0]}))
    color_augmented = plain.with_color_augmented(40)
    drawn, before = list(color_augmented.draw([SHAPE])), list(plain.draw([SHAPE]))
    assert [s.source for s in drawn[5:9]] == ["a.png", "b.png", "a.png", "b.png"]
    for one, other in zip(drawn, before, strict=False):
        np.testing.assert_array_equal(one.noisy, other.noisy)
    assert color_augmented.digest() != plain.digest()
    spreads = {}
    for name, part in (("plain", drawn[:5]), ("color_augmented", drawn[5:])):
        spreads[name] = np.mean([s.truth.max(axis=1) - s.truth.min(axis=1) for s in part])
        residual = np.concatenate([(s.noisy - s.truth).ravel() for s in part])
        assert residual.std() == pytest.approx(25 / 255, rel=0.05)  # of 23,000 values at least: 0.5 %
    assert spreads["color_augmented"] > 2 * spreads["plain"]
    assert all(s.truth.min() >= 0 and s.truth.max() <= 1 for s in drawn[5:])


def test_vivid_colours_of_a_warm_photo_are_all_colours(tmp_path):
    warm = np.clip(waves() // 4 + np.array([150, 80, 10], dtype=np.uint8), 0, 255)
    Image.fromarray(warm).save(tmp_path / "warm.png")
    opened = open_set(write_set(tmp_path, files=[entry(tmp_path / "warm.png")])).with_color_augmented(40)
    orders = [tuple(np.argsort(s.truth.mean(axis=(0, 2, 3)))) for s in opened.draw([SHAPE])]
    assert set(orders[:5]) == {(2, 1, 0)}
    assert set(orders[5:]) == set(permutations(range(3)))


def test_vivid_colours_of_noisy_photos_are_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"noise of kind 'none'\. Set quantize\.color_augmented: 0"):
        open_set(write_set(tmp_path, noise={"kind": "none"})).with_color_augmented(2)


def test_digest_follows_what_is_drawn(tmp_path):
    path = write_set(tmp_path)
    same, moved = open_set(path).digest(), tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    assert open_set(moved / "set.yaml").digest() == same
    digests = {
        open_set(write_set(tmp_path, **c)).digest()
        for c in ({"seed": 3}, {"samples": 6}, {"noise": {**NOISE, "clip": True}}, {"raw": RAW})
    }
    assert len(digests | {same}) == 5


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    text = refused(open_set, tmp_path)
    assert "holds no image (1 other entries); expected files with a suffix of .avif, .bmp, .gif" in text


def test_missing_set_is_refused(tmp_path):
    assert "cannot be read (No such file or directory); expected a manifest" in refused(
        open_set, tmp_path / "no.yaml"
    )


def test_missing_file_is_refused_by_name(tmp_path):
    path = write_set(tmp_path)
    (tmp_path / "b.png").unlink()
    text = refused(open_set, path)
    assert "b.png cannot be read (No such file or directory)" in text
    assert str(path) in text


def test_altered_file_is_refused_with_both_digests(tmp_path):
    path = write_set(tmp_path)
    expected = digest(tmp_path / "b.png")
    save_image(tmp_path / "b.png", seed=7)
    assert f"b.png has sha256 {digest(tmp_path / 'b.png')}; expected {expected} as in" in refused(
        open_set, path
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampels": 3}, ["unknown key 'sampels'", "did you mean 'samples'?"]),
        ({"noise": {"sigmas": [1.0]}}, ["unknown key 'noise.sigmas'", "did you mean 'sigma'?"]),
        ({"noise": {"sigma": []}}, ["noise.sigma is []"]),
        ({"noise": None}, ["noise is None"]),
        ({"samples": 0}, ["samples is 0", "greater than or equal to 1"]),
        ({"files": []}, ["files is []"]),
        ({"files": [{"name": "a.png", "sha256": "abc"}]}, ["files.0.sha256 is 'abc'"]),
        ({"licence": None}, ["licence is None"]),
    ],
    ids=lambda v: "" if isinstance(v, list) else next(iter(v)),
)
def test_wrong_manifest_is_refused_with_key_and_value(tmp_path, changes, words):
    text = refused(open_set, write_set(tmp_path, **changes))
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "content", ["a: [1", "- a\n", "", "3: 4"], ids=["broken", "list", "empty", "number-key"]
)
def test_file_that_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "set.yaml"
    path.write_text(content)
    assert f"image set {path}" in refused(open_set, path)


def test_image_given_as_the_set_is_refused(tmp_path):
    assert "is not a manifest" in refused(open_set, save_image(tmp_path / "a.png"))


def test_constant_image_is_refused(tmp_path):
    Image.new("RGB", (64, 64), (51, 51, 51)).save(tmp_path / "flat.png")
    text = refused(open_set, tmp_path)
    assert "flat.png is constant (0.200)" in text
    assert "Remove the file" in text


def test_images_are_resized_before_crops_are_drawn_and_noise_is_added(tmp_path):
    """To half its size: each pixel is a mean of 4 x 4, weighted by a triangle, 1 3 3 1 in a row."""
    path = write_set(tmp_path, names=("a.png",), samples=1, short_side=35)
    whole = np.asarray(Image.open(tmp_path / "a.png"), dtype=np.float64).transpose(2, 0, 1) / 255
    windows = np.lib.stride_tricks.sliding_window_view(whole, (4, 4), axis=(1, 2))[:, 1::2, 1::2]
    means = np.einsum("chwij,i,j->chw", windows, *[np.array([1, 3, 3, 1]) / 8] * 2)
    (sample,) = draw(path, (1, 3, 45, 35))
    inner = sample.truth[0, :, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, means, rtol=0, atol=1e-6)  # float32
    noise = (sample.noisy - sample.truth).ravel() * 255
    assert abs(noise.std() - sample.sigma) < 4 * sample.sigma / np.sqrt(2 * noise.size)


def test_random_values_are_refused_also_where_they_are_made_smaller(tmp_path):
    """The mean of some pixels is like that of those beside them."""
    values = np.random.default_rng(0).integers(256, size=(96, 96, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "random.png")
    path = write_set(tmp_path, names=(), files=[entry(tmp_path / "random.png")], short_side=48)
    assert "random.png is random" in refused(draw, path)


def test_image_that_would_be_enlarged_is_refused(tmp_path):
    text = refused(draw, write_set(tmp_path, short_side=71))
    assert "a.png is 70 x 90, and short_side of the set 'waves' is 71" in text


def test_size_is_part_of_what_a_set_is(tmp_path):
    digests = {open_set(write_set(tmp_path, short_side=side)).digest() for side in (None, 35, 36)}
    assert len(digests) == 3


def test_photos_with_noise_of_their_own_are_not_resized(tmp_path):
    text = refused(open_set, write_pairs(tmp_path, short_side=35))
    assert "set.yaml: short_side is 35, and the set's noise is 'real'" in text


def test_crop_of_a_margin_is_drawn_again(tmp_path):
    pixels = np.array(Image.open(save_image(tmp_path / "a.png")))
    pixels[: len(pixels) * 2 // 3] = (10, 20, 200)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = write_set(tmp_path, names=(), samples=12, files=[entry(tmp_path / "a.png")])
    truths = [sample.truth for sample in draw(path, (1, 3, 16, 16))]
    assert len(truths) == 12
    assert all((truth != truth[:, :, :1, :1]).any() for truth in truths)


def test_truncated_image_is_refused(tmp_path):
    path = save_image(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-200])
    text = refused(open_set, tmp_path)
    assert "a.png" in text
    assert "remove it there, or replace it" in text


def test_sets_that_share_a_file_by_content_are_refused(tmp_path):
    for name in ("calibration", "validation"):
        (tmp_path / name).mkdir()
    first = open_set(write_set(tmp_path / "calibration"))
    other = tmp_path / "validation"
    save_image(other / "new.png", seed=9)
    refuse_overlap(first, open_set(other))
    shutil.copy(tmp_path / "calibration" / "a.png", other / "renamed.png")
    with pytest.raises(
        CalibrationError, match=r"'waves' and .*'validation' share 1 files .*renamed\.png \(a\.png\)"
    ):
        refuse_overlap(first, open_set(other))


def test_root_may_be_an_installed_package(tmp_path):
    import edgedyn

    source = Path(edgedyn.__file__)
    files = [{"name": source.name, "sha256": digest(source)}]
    opened = open_set(write_set(tmp_path, root="package:edgedyn/", files=files))
    assert opened.files == ((source, digest(source)),)


def test_file_may_stand_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "more").mkdir()
    other = save_image(tmp_path / "more" / "c.png", seed=7)
    first = save_image(tmp_path / "a.png")
    opened = open_set(write_set(tmp_path, files=[entry(first), {**entry(other), "root": "more"}]))
    assert [path.resolve() for path, _ in opened.files] == [first.resolve(), other.resolve()]
    text = refused(
        open_set, write_set(tmp_path, files=[{**entry(other), "root": "package:no_such_package/x"}])
    )
    assert "pip install no_such_package" in text


def test_package_that_is_not_installed_is_refused_with_the_command(tmp_path):
    text = refused(open_set, write_set(tmp_path, root="package:no_such_package/data"))
    assert "needs the package 'no_such_package'. Run: pip install no_such_package" in text


@pytest.mark.parametrize("name", ["skimage", "photos"])
def test_sets_of_the_project_open_and_do_not_overlap(name):
    folder = Path(__file__).parents[2] / "calib"
    calibration, validation = open_set(folder / f"{name}.yaml"), open_set(folder / "skimage-validation.yaml")
    assert isinstance(calibration, CalibrationSet)
    refuse_overlap(calibration, validation)
    for opened in (calibration, validation):
        assert opened.licence
        assert not opened.noise.clip


def test_values_of_a_user_take_the_place_of_the_set_s_own(tmp_path):
    path = write_set(tmp_path, noise={"sigma": [15.0, 50.0], "clip": False})
    own = open_set(path)
    at_level = open_set(path, noise=40.0)
    assert (at_level.noise.sigma, at_level.noise.clip) == ([40.0], False)
    noise = NoiseSection(kind="none")
    assert open_set(path, noise=noise).noise == noise
    made = open_set(path, samples=2, color_augmented=3)
    assert (made.samples, made.color_augmented, made.noise) == (2, 3, own.noise)
    assert made.digest() == own.take(2).with_color_augmented(3).digest()
    assert own.with_values(noise=40.0).digest() == at_level.digest() != own.digest()
