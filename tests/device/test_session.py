"""Sessions: images of any size through a real program in tiles, without seams; and checks on the device."""

import itertools

import numpy as np
import pytest
from PIL import Image
from small_sessions import ATOL, OVERLAP, RADIUS, TILE, blur, load, picture, session_of, tensor, write

from edgedyn import targets
from edgedyn.device.files import run
from edgedyn.device.session import Session, check, open_session
from edgedyn.device.tiling import tiles
from edgedyn.errors import (
    BundleError,
    CheckFailedError,
    ImageError,
    TargetMissingError,
    UsageError,
)


@pytest.fixture
def session(tmp_path):
    return session_of(write(tmp_path / "bundle"))


def whole(pixels):
    """Return the blur of the whole image at once."""
    height, width, channels = pixels.shape
    y = load(blur(channels, height, width))(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))[0]
    return y[0].transpose(1, 2, 0)


SIZES = [1, 2, 7, 16, 17, 23, 24, 25, 31, 32, 33, 40, 41, 61, 100, 129]


@pytest.mark.parametrize("overlap", [0, 1, 2, 5, 8, 15])
@pytest.mark.parametrize(("height", "width"), itertools.product(SIZES, SIZES[::3]))
def test_tile_weights_sum_to_one_at_every_pixel(height, width, overlap):
    total = np.zeros((max(height, 16), max(width, 24)))
    for tile in tiles(height, width, 16, 24, overlap):
        weights = tile.rows[:, None].astype(float) * tile.columns
        assert weights.min() >= 0
        here = total[tile.top : tile.top + 16, tile.left : tile.left + 24]
        assert here.shape == (16, 24), "a tile reaches beyond the image"
        here += weights
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 1, 4, 8, 15])
@pytest.mark.parametrize("size", [size for size in SIZES if size > 24])
def test_tiles_reach_both_borders_and_share_at_least_the_overlap(size, overlap):
    tops = sorted({tile.top for tile in tiles(size, 3, 16, 16, overlap)})
    assert (tops[0], tops[-1]) == (0, size - 16)
    steps = np.diff(tops)
    assert steps.max() <= 16 - overlap
    assert steps.max() - steps.min() <= 1
    assert (len(tops) - 2) * (16 - overlap) + 16 < size, "one tile fewer would do"


@pytest.mark.parametrize("overlap", [4, 8, 15])
@pytest.mark.parametrize("size", [25, 33, 61, 100])
def test_the_outer_quarter_of_the_overlap_never_counts_inside_the_image(size, overlap):
    margin = overlap // 4
    for tile in tiles(size, 3, 16, 16, overlap):
        if tile.top > 0:
            assert not tile.rows[:margin].any()
        if tile.top < size - 16:
            assert not tile.rows[16 - margin :].any()


def test_an_image_of_one_tile_or_less_is_one_tile_of_weight_one():
    for height, width in ((1, 1), (16, 24), (5, 24)):
        (tile,) = tiles(height, width, 16, 24, 8)
        assert (tile.top, tile.left) == (0, 0)
        assert (tile.rows == 1).all()
        assert (tile.columns == 1).all()


@pytest.mark.parametrize("overlap", [-1, 16, 30])
def test_an_overlap_that_is_no_part_of_a_tile_is_refused(overlap):
    with pytest.raises(BundleError, match=f"found {overlap}, expected 0 to 15"):
        tiles(100, 100, 16, 24, overlap)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 25), (33, 24), (61, 83), (16, 100), (128, 31)])
def test_tiled_equals_whole_where_the_overlap_is_four_radii(session, height, width):
    pixels = picture(height, width)
    np.testing.assert_allclose(session.process(pixels), whole(pixels), rtol=0, atol=ATOL)


def test_with_less_overlap_only_the_surroundings_of_cuts_differ(tmp_path):
    session = session_of(write(tmp_path / "bundle", overlap=0))
    pixels = picture(32, 48)  # two tiles each way, cut at row 16 and column 24
    wrong = np.abs(session.process(pixels) - whole(pixels)).max(axis=2) > ATOL
    near_row = np.abs(np.arange(32) + 0.5 - 16) < RADIUS
    near_column = np.abs(np.arange(48) + 0.5 - 24) < RADIUS
    assert wrong.any()
    assert not (wrong & ~(near_row[:, None] | near_column)).any()


@pytest.mark.parametrize("overlap", [0, 3, 8, 15])
def test_a_flat_image_inside_shows_no_seam(tmp_path, overlap):
    session = Session(write(tmp_path / "bundle", overlap=overlap), lambda x: [x])
    pixels = picture(50, 70)
    # The identity: only the weights act; 4 tiles, each with its weight's rounding.
    np.testing.assert_allclose(session.process(pixels), pixels, rtol=0, atol=8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (7, 5), (15, 23), (3, 100)])
def test_a_small_image_is_continued_by_reflection(session, height, width):
    pixels = picture(height, width)
    rows, columns = (reflected(size, tile) for size, tile in zip((height, width), TILE, strict=True))
    expected = whole(pixels[rows][:, columns])[:height, :width]
    result = session.process(pixels)
    assert result.shape == pixels.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=ATOL)


def reflected(size, tile):
    """Return 0 1 .. n-1 n-2 .. 1 0 1 .., as long as the larger of size and tile."""
    period = max(2 * size - 2, 1)
    places = np.arange(max(size, tile)) % period
    return np.where(places < size, places, period - places)


def test_gray_through_three_channels_is_the_mean_of_three_and_stays_gray(session):
    gray = picture(33, 40, 1)
    result = session.process(gray)
    assert result.shape == gray.shape
    expected = whole(np.repeat(gray, 3, axis=2)).mean(axis=2, keepdims=True)
    np.testing.assert_allclose(result, expected, rtol=0, atol=ATOL)


def test_colour_through_one_channel_runs_each_channel_by_itself(tmp_path):
    session = session_of(write(tmp_path / "bundle", channels=1))
    pixels = picture(33, 40)
    expected = np.concatenate([whole(pixels[:, :, c : c + 1]) for c in range(3)], axis=2)
    np.testing.assert_allclose(session.process(pixels), expected, rtol=0, atol=ATOL)


def test_a_float16_bundle_gets_float16_and_gives_float32(tmp_path):
    bundle = write(tmp_path / "bundle", dtype="float16")
    seen = []

    def run(x):
        seen.append(x.dtype)
        return load(str(bundle.path / "model.onnx"))(x)

    pixels = picture(20, 30)
    result = Session(bundle, run).process(pixels.astype(np.float64))
    assert set(seen) == {np.dtype("float16")}
    assert result.dtype == np.float32
    # Input and kernel rounded to float16, and the output: 3 roundings of eps / 2, of values up to 1.75; the
    # sum itself in float16 at worst: 25 more.
    np.testing.assert_allclose(result, whole(pixels), rtol=0, atol=28 * np.finfo(np.float16).eps / 2 * 1.75)


def test_progress_counts_every_tile_of_every_plane(tmp_path):
    session = session_of(write(tmp_path / "bundle", channels=1))
    calls = []
    session.process(picture(33, 40), progress=lambda done, total: calls.append((done, total)))
    total = 3 * len(tiles(33, 40, *TILE, OVERLAP))
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_arrays_that_are_no_picture_are_refused(session):
    for pixels in (picture(9, 9, 2), picture(9, 9)[:, :, 0], picture(0, 9), np.zeros((9, 9, 3), np.uint8)):
        with pytest.raises(ImageError, match=r"expected (floating-point )?\(H, W, C\), C 1"):
            session.process(pixels)
    pixels = picture(9, 9)
    pixels[3, 4, 1] = np.nan
    pixels[0, 0, 0] = np.inf
    with pytest.raises(ImageError, match="found 2 pixel values that are not finite"):
        session.process(pixels)


def test_a_program_that_returns_another_shape_or_nan_is_noticed(session):
    for wrong in (lambda x: [x[:, :1]], lambda x: [x * np.float32("nan")]):
        with pytest.raises(CheckFailedError, match="the program's output"):
            Session(session.bundle, wrong).process(picture(9, 9))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([tensor("x", (1, 3, 16, 24))], [tensor("y", (1, 10))]),
        ([tensor("x", (2, 3, 16, 24))], [tensor("y", (2, 3, 16, 24))]),
        ([tensor("x", (1, 2, 16, 24))], [tensor("y", (1, 2, 16, 24))]),
        ([tensor("x", (1, 3, 16, 24))] * 2, [tensor("y", (1, 3, 16, 24))]),
    ],
)
def test_a_program_that_is_not_image_to_image_takes_no_picture(tmp_path, inputs, outputs):
    vectors = [] if len(inputs) > 1 else None
    changes = {"inputs": inputs, "outputs": outputs} | ({} if vectors is None else {"vectors": vectors})
    session = session_of(write(tmp_path / "bundle", **changes))
    with pytest.raises(ImageError, match="takes and returns"):
        session.process(picture(9, 9))


def test_vectors_pass_where_the_program_computes_what_was_built(session):
    report = check(session)
    assert report.ok
    verdict, worst, rms = report.rows
    assert (verdict.between, verdict.metric) == ("build:report", "failed_builds")
    assert (worst.between, worst.metric) == ("device:vectors", "max_abs[vectors/0.input.npy]")
    assert (worst.limit, worst.samples, worst.value) == ({"at_most": 1e-6}, 1, 0.0)
    assert (rms.between, rms.metric) == ("device:vectors", "rms[vectors/0.input.npy]")
    assert (rms.limit, rms.samples, rms.value) == ({"at_most": 1e-7}, 1, 0.0)


def test_a_small_error_at_every_pixel_is_noticed(tmp_path):
    report = check(session_of(write(tmp_path / "off", bias=5e-7)))
    assert [row.passed for row in report.rows] == [True, True, False]


def test_a_bundle_whose_build_failed_does_not_pass(tmp_path):
    report = check(session_of(write(tmp_path / "failed", ok=False)))
    assert [row.passed for row in report.rows] == [False, True, True]


def test_vectors_fail_where_it_does_not(tmp_path, session):
    report = check(session_of(write(tmp_path / "off", bias=1e-3)))
    assert not report.ok
    # One rounding of the sum to float32.
    assert report.rows[1].value == pytest.approx(1e-3, rel=0, abs=2 * float(np.finfo(np.float32).eps))
    assert not check(Session(session.bundle, lambda x: [x * np.float32("nan")])).ok
    assert not check(session_of(write(tmp_path / "none", vectors=[]))).ok
    with pytest.raises(CheckFailedError, match=r"found \[\(1, 1, 16, 24\)\], expected"):
        check(Session(session.bundle, lambda x: [x[:, :1]]))


@pytest.mark.parametrize(
    "array", [np.zeros((1, 3, 16, 23), np.float32), np.zeros((1, 3, *TILE)), np.array([{}])]
)
def test_a_vector_that_is_no_array_of_the_right_kind_is_refused(session, array):
    # After opening, as a file that changes under a running program.
    np.save(session.bundle.path / "vectors" / "0.input.npy", array, allow_pickle=True)
    with pytest.raises(BundleError, match=r"vectors/0\.input\.npy: found .*expected \.npy without pickle"):
        check(session)


def test_opening_verifies_loads_and_runs(tmp_path):
    write(tmp_path / "bundle")
    session = open_session(tmp_path / "bundle")
    assert check(session).ok
    assert session.process(picture(20, 30)).shape == (20, 30, 3)
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"file model\.onnx"):
        open_session(tmp_path / "bundle")


def test_opening_says_what_is_missing(tmp_path, monkeypatch):
    write(tmp_path / "unknown", target="abacus")
    with pytest.raises(BundleError, match="target 'abacus' is unknown"):
        open_session(tmp_path / "unknown")
    write(tmp_path / "uncompiled", programs={"forward": "model.engine"})
    with pytest.raises(UsageError, match=r"has no model\.engine yet.*edgedyn compile"):
        open_session(tmp_path / "uncompiled")
    write(tmp_path / "bundle")
    target = targets.load("onnxruntime")
    monkeypatch.setitem(onnxruntime_module().__dict__, "TARGET", replace_missing(target))
    with pytest.raises(TargetMissingError, match="needs the target 'onnxruntime': not here; install it"):
        open_session(tmp_path / "bundle")


def onnxruntime_module():
    import edgedyn.targets.onnxruntime as module

    return module


def replace_missing(target):
    import dataclasses

    return dataclasses.replace(target, missing=lambda: "not here; install it")


def test_packed_bayer_runs_from_arrays_and_photos_are_refused(tmp_path):
    bundle = write(tmp_path / "bundle", channels=4)
    session, pixels = session_of(bundle), picture(33, 40, 4)
    np.testing.assert_allclose(session.process(pixels), whole(pixels), rtol=0, atol=ATOL)
    np.save(tmp_path / "raw.npy", pixels)
    (result,) = run(session, tmp_path / "raw.npy", tmp_path / "out")
    assert result == tmp_path / "out" / "raw.npy"
    np.testing.assert_array_equal(np.load(result), session.process(pixels))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(ImageError, match=r"found an image \(20, 30, 3\), expected .* C 4, packed Bayer"):
        run(session, tmp_path / "photo.png", tmp_path / "out")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': (")
    with pytest.raises(ImageError, match=r"broken\.npy: found no array"):
        run(session, tmp_path / "broken.npy", tmp_path / "out")
    with pytest.raises(ImageError, match=r"expected \.npy for an array"):
        run(session, tmp_path / "raw.npy", tmp_path / "result.png")


def test_colours_are_no_packed_bayer(session):
    with pytest.raises(ImageError, match=r"found an image \(9, 9, 4\), expected .* C 1 or 3"):
        session.process(picture(9, 9, 4))
