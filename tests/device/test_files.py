"""Image files through a real program: folders, patterns, streams, bad files, results that exist, strips."""

from __future__ import annotations

import io
import os
import resource
import sys
import types

import numpy as np
import pytest
from PIL import Image
from small_images import encoded, exif_of
from small_sessions import picture, session_of, write

from edgedyn.device import files
from edgedyn.device.files import FAILED, THERE, WRITTEN, plan, run, run_jobs
from edgedyn.device.session import Session
from edgedyn.device.tiling import padded, tiles
from edgedyn.errors import CheckFailedError, EdgedynError, ImageError, UsageError
from edgedyn.images.photo import read_image


@pytest.fixture
def session(tmp_path):
    return session_of(write(tmp_path / "bundle"))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(pixels.squeeze() * 255).astype(np.uint8)).save(path, **options)
    return path


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def whole_picture(session, pixels, scale=1):
    """Blend the tiles of the whole picture at once: what strips must equal bit for bit."""
    (channels, tile_h, tile_w), (height, width) = session.bundle.inputs[0].shape[1:], pixels.shape[:2]
    bands = pixels.transpose(2, 0, 1).astype(np.float32)
    planes = [bands] if len(bands) == channels else [np.repeat(b[None], channels, axis=0) for b in bands]
    results = []
    for plane in (padded(plane, tile_h, tile_w) for plane in planes):
        blended = np.zeros((len(plane), plane.shape[1] * scale, plane.shape[2] * scale), np.float32)
        for tile in tiles(height, width, tile_h, tile_w, session.bundle.overlap):
            x = plane[:, tile.top : tile.top + tile_h, tile.left : tile.left + tile_w]
            y = session.run(np.ascontiguousarray(x[None]))[0][0]
            weight = tile.rows.repeat(scale)[:, None] * tile.columns.repeat(scale)
            rows = slice(tile.top * scale, (tile.top + tile_h) * scale)
            blended[:, rows, tile.left * scale : (tile.left + tile_w) * scale] += weight * y
        results.append(blended)
    joined = np.concatenate(results)[:, : height * scale, : width * scale].transpose(1, 2, 0)
    return joined.mean(axis=2, keepdims=True) if pixels.shape[2] < channels else joined


@pytest.mark.parametrize("overlap", [0, 5, 8, 15])
@pytest.mark.parametrize("size", [(1, 1), (7, 90), (16, 24), (17, 25), (61, 20), (100, 83)])
@pytest.mark.parametrize(("channels", "colours"), [(3, 3), (1, 3), (3, 1)])
def test_strips_equal_the_whole_picture_bit_for_bit(tmp_path, overlap, size, channels, colours):
    session = session_of(write(tmp_path / "bundle", channels=channels, overlap=overlap))
    pixels = picture(*size, colours)
    read = []

    def read_part(top, bottom, left, right):
        read.append((bottom - top, right - left))
        return pixels[top:bottom, left:right]

    strips = [(top, rows.copy()) for top, rows in session.strips(pixels.shape, read_part)]
    assert np.array_equal(np.concatenate([rows for _, rows in strips]), whole_picture(session, pixels))
    assert [top for top, _ in strips] == [0, *np.cumsum([len(rows) for _, rows in strips])[:-1]]
    assert np.max(read, axis=0).tolist() == [min(16, size[0]), min(24, size[1])]
    assert np.array_equal(session.process(pixels), whole_picture(session, pixels))


def double(session):
    """A program whose output is twice as high and wide: each pixel four times, with another factor each."""
    outputs = [{**session.bundle.manifest["outputs"][0], "shape": [1, 3, 32, 48]}]
    manifest = {**session.bundle.manifest, "outputs": outputs}
    factors = np.array([[1, 0.5], [0.25, 0.75]], np.float32)
    bundle = type(session.bundle)(session.bundle.path, manifest)
    return Session(bundle, lambda x: [np.kron(x, factors[None, None]).astype(np.float32)])


def test_strips_of_a_program_that_enlarges_equal_the_whole_picture(session):
    twice, pixels = double(session), picture(45, 61)
    assert np.array_equal(twice.process(pixels), whole_picture(twice, pixels, scale=2))


def test_a_program_that_enlarges_writes_larger_files_with_their_alpha(tmp_path, session):
    array = np.rint(picture(20, 30, 4) * 255).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    (result,) = run(double(session), [tmp_path / "a.png"], tmp_path / "out")
    photo = read_image(result)
    assert photo.shape == (40, 60, 3)
    expected = np.clip(double(session).process(read_image(tmp_path / "a.png").pixels), 0, 1)
    np.testing.assert_allclose(photo.pixels, expected, rtol=0, atol=0.5 / 255 + 1e-6)
    alpha = Image.fromarray(array[:, :, 3]).resize((60, 40), Image.Resampling.BILINEAR)
    assert np.array_equal(np.rint(photo.alpha * 255), np.asarray(alpha))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_file_is_the_quantized_result_of_its_whole_picture(tmp_path, session, dtype, channels):
    array = (picture(61, 50, channels) * np.iinfo(dtype).max).astype(dtype)
    name = "a.png" if dtype == np.uint8 else "a.tif"
    if dtype == np.uint8:
        Image.fromarray(array.squeeze()).save(tmp_path / name)
    else:
        import tifffile

        colour = "rgb" if channels > 2 else "minisblack"
        extra = ["unassalpha"] if channels in (2, 4) else None
        planar = "contig" if channels > 1 else None
        tifffile.imwrite(
            tmp_path / name, array.squeeze(), photometric=colour, extrasamples=extra, planarconfig=planar
        )
    before = read_image(tmp_path / name)
    (result,) = run(session, tmp_path / name, tmp_path / "out")
    after, full = read_image(result), np.iinfo(dtype).max
    expected = np.rint(np.clip(whole_picture(session, before.pixels), 0, 1) * np.float32(full))
    assert np.array_equal(np.rint(after.pixels * np.float32(full)), expected)
    assert before.alpha is None or np.array_equal(before.alpha, after.alpha)
    assert (before.alpha is None) == (after.alpha is None)


def test_a_turned_photo_is_the_result_of_its_upright_picture(tmp_path, session):
    path = save(tmp_path / "a.png", picture(30, 47), exif=exif_of(6))
    (result,) = run(session, path, tmp_path / "out")
    upright = read_image(path)
    assert upright.shape == (47, 30, 3)
    expected = np.rint(np.clip(whole_picture(session, upright.pixels), 0, 1) * 255)
    assert np.array_equal(np.rint(read_image(result).pixels * 255), expected)


def test_files_come_out_under_their_names_in_their_mode(tmp_path, session):
    images = [save(tmp_path / "a.png", picture(20, 30)), save(tmp_path / "b.tif", picture(40, 20, 1))]
    calls = []
    results = run(session, images, tmp_path / "deep" / "out", progress=lambda *call: calls.append(call))
    assert results == [tmp_path / "deep" / "out" / "a.png", tmp_path / "deep" / "out" / "b.tif"]
    for image, result in zip(images, results, strict=True):
        expected = np.clip(session.process(read_image(image).pixels), 0, 1)
        found = read_image(result)
        assert found.pixels.shape == expected.shape
        # Half a step of 8 bits.
        np.testing.assert_allclose(found.pixels, expected, rtol=0, atol=0.5 / 255 + 1e-6)
    assert [call for call in calls if call[1] == call[2]] == [(images[0], 4, 4), (images[1], 4, 4)]
    assert names(tmp_path / "deep" / "out") == ["a.png", "b.tif"]


def test_files_are_refused_before_any_work(tmp_path, session):
    good, out = save(tmp_path / "a.png", picture(20, 30)), tmp_path / "out"
    twin = save(tmp_path / "sub" / "A.PNG", picture(20, 30))
    text = tmp_path / "c.txt"
    text.write_text("no picture")
    (tmp_path / "none").mkdir()
    idle = Session(session.bundle, lambda x: pytest.fail("work was done"))
    cases = [
        ([], out, "no images"),
        ([good, twin], out, "of one name"),
        ([good, tmp_path / "sub"], out, "of one name"),
        ([good], tmp_path, "would be overwritten"),
        ([good, twin], tmp_path / "sub", "of one name"),
        ([good], good, "would be overwritten"),
        ([good, tmp_path / "none.png"], out, "found no file"),
        ([good, tmp_path / "none"], out, "found no image.*--recursive"),
        ([tmp_path / "*.jpg"], out, "pattern .*found no image"),
        ([good, text], out, r"found suffix '\.txt', expected \['\.png'"),
        ([good], text, "cannot make the folder"),
        ([good, tmp_path / "sub"], tmp_path / "one.png", "found 2 images for the one file"),
        ([good], session.bundle.path, "would make the bundle invalid"),
        ([good], session.bundle.path / "vectors", "would make the bundle invalid"),
        ([good], session.bundle.path / "one.png", "would make the bundle invalid"),
    ]
    before = names(tmp_path)
    for images, folder, message in cases:
        for force in (False, True):
            with pytest.raises(EdgedynError, match=message):
                run(idle, images, folder, force=force)
    assert names(tmp_path) == before
    assert not out.exists()


def test_no_input_of_the_batch_is_overwritten_by_another_ones_result(tmp_path, session):
    first = save(tmp_path / "one" / "a.png", picture(20, 30))
    second = save(tmp_path / "two" / "b.png", picture(20, 30))
    link = tmp_path / "one" / "b.png"
    link.symlink_to(second)
    before = second.read_bytes()
    with pytest.raises(UsageError, match="would be overwritten"):
        run(session, [first.parent / "a.png", second], tmp_path / "one", force=True)
    assert second.read_bytes() == before


def test_results_that_exist_are_kept_and_told_unless_forced(tmp_path, session):
    images = [save(tmp_path / name, picture(20, 30)) for name in ("a.png", "b.png")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"mine")
    jobs = plan(session, images, tmp_path / "out")
    assert [outcome.state for outcome in run_jobs(session, jobs)] == [WRITTEN, THERE]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"mine"
    idle = Session(session.bundle, lambda x: pytest.fail("work was done"))
    assert [outcome.state for outcome in run_jobs(idle, jobs)] == [THERE, THERE]
    assert run(session, images, tmp_path / "out", force=True) == [job.result for job in jobs]
    assert read_image(tmp_path / "out" / "b.png").pixels.shape == (20, 30, 3)


def test_one_bad_file_stops_no_other_one(tmp_path, session):
    for name in ("a.png", "c.png", "e.png"):
        save(tmp_path / "in" / name, picture(20, 30))
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:300])
    (tmp_path / "in" / "d.jpg").write_bytes(b"no picture")
    outcomes = run_jobs(session, plan(session, [tmp_path / "in"], tmp_path / "out"))
    assert [outcome.state for outcome in outcomes] == [WRITTEN, FAILED, WRITTEN, FAILED, WRITTEN]
    assert names(tmp_path / "out") == ["a.png", "c.png", "e.png"]
    assert "b.png: found" in str(outcomes[1].error)
    assert outcomes[3].to_json()["error"]["type"] == "ImageError"
    with pytest.raises(ImageError, match=r"2 of 5 images failed; the first: image .*b\.png"):
        run(session, tmp_path / "in", tmp_path / "out")


def test_a_folder_that_gets_no_result_is_not_left(tmp_path, session):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new/deep/folder", tmp_path / "there"):
        with pytest.raises(ImageError):
            run(session, [tmp_path / "bad.png"], out)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "there").is_dir()


def test_a_program_that_fails_on_one_image_stops_no_other_one(tmp_path, session):
    dark, light = save(tmp_path / "a.png", picture(9, 9) * 0), save(tmp_path / "b.png", picture(9, 9))
    program = Session(session.bundle, lambda x: [x if x.max() else x * np.float32("nan")])
    outcomes = run_jobs(program, plan(program, [dark, light], tmp_path / "out"))
    assert [type(outcome.error) for outcome in outcomes] == [CheckFailedError, type(None)]


def test_a_folder_gives_its_own_images_and_recursive_those_below_in_their_places(tmp_path, session):
    for name in ("b.png", "a.JPG", "sub/a.png", "sub/deep/c.webp", ".hidden.png", ".trash/d.png"):
        save(tmp_path / "in" / name, picture(9, 9))
    (tmp_path / "in" / "notes.txt").write_text("x")
    run(session, tmp_path / "in", tmp_path / "flat")
    assert names(tmp_path / "flat") == ["a.JPG", "b.png"]
    inside = tmp_path / "in" / "results"
    for _ in range(2):  # results inside the folder are no inputs of the next run
        run(session, tmp_path / "in", inside, recursive=True)
        assert names(inside) == ["a.JPG", "b.png", "sub/a.png", "sub/deep/c.webp"]


def test_a_folder_or_pattern_without_photos_gives_its_arrays(tmp_path, session):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.npy", "b.npy", ".c.npy"):
        np.save(folder / name, picture(9, 9))
    run(session, folder, tmp_path / "arrays")
    run(session, str(folder / "*.npy"), tmp_path / "pattern")
    assert names(tmp_path / "arrays") == names(tmp_path / "pattern") == ["a.npy", "b.npy"]
    save(folder / "photo.png", picture(9, 9))
    run(session, folder, tmp_path / "photos")
    assert names(tmp_path / "photos") == ["photo.png"]


def test_a_pattern_gives_the_images_that_match(tmp_path, session):
    for name in ("a1.png", "a2.png", "b1.png", "x/a3.png"):
        save(tmp_path / "in" / name, picture(9, 9))
    (tmp_path / "in" / "a.txt").write_text("x")
    assert len(run(session, str(tmp_path / "in" / "a*"), tmp_path / "one")) == 2
    assert len(run(session, str(tmp_path / "in" / "**" / "a*"), tmp_path / "two")) == 3
    bracket = save(tmp_path / "in" / "IMG[1].png", picture(9, 9))
    assert run(session, bracket, tmp_path / "three") == [tmp_path / "three" / "IMG[1].png"]


def test_arrays_of_a_folder_are_taken_where_it_has_no_photos(tmp_path, session):
    (tmp_path / "in").mkdir()
    for name in ("b.npy", "a.npy", ".hidden.npy"):
        np.save(tmp_path / "in" / name, picture(9, 9))
    for source in (tmp_path / "in", str(tmp_path / "in" / "*.npy")):
        run(session, source, tmp_path / "out", force=True)
        assert names(tmp_path / "out") == ["a.npy", "b.npy"]
    save(tmp_path / "in" / "c.png", picture(9, 9))
    run(session, tmp_path / "in", tmp_path / "photos")
    assert names(tmp_path / "photos") == ["c.png"]


def test_formats_that_are_only_read_become_png(tmp_path, session):
    save(tmp_path / "a.gif", picture(9, 9))
    assert run(session, tmp_path / "a.gif", tmp_path / "out") == [tmp_path / "out" / "a.png"]
    save(tmp_path / "a.png", picture(9, 9))
    with pytest.raises(UsageError, match="of one name"):
        run(session, [tmp_path / "a.gif", tmp_path / "a.png"], tmp_path / "both")


def test_one_image_goes_into_a_named_file_of_another_format(tmp_path, session):
    path = save(tmp_path / "a.png", picture(20, 30))
    assert run(session, path, tmp_path / "new" / "b.tif") == [tmp_path / "new" / "b.tif"]
    assert np.array_equal(
        read_image(tmp_path / "new" / "b.tif").pixels,
        read_image(run(session, path, tmp_path / "out")[0]).pixels,
    )


class Stream(io.BytesIO):
    def isatty(self):
        return False


def streams(monkeypatch, data):
    written = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdin", types.SimpleNamespace(buffer=Stream(data), isatty=lambda: False), raising=True
    )
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=written, flush=lambda: None))
    return written


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF"])
def test_standard_input_goes_to_standard_output_in_its_format(tmp_path, session, monkeypatch, kind):
    stream = io.BytesIO()
    Image.fromarray(np.rint(picture(20, 30) * 255).astype(np.uint8)).save(stream, kind)
    with monkeypatch.context() as patch:
        written = streams(patch, stream.getvalue())
        run(session, "-", "-")
    (tmp_path / "out").write_bytes(written.getvalue())
    found = read_image(tmp_path / "out")
    assert found.format == ("PNG" if kind == "GIF" else kind)
    assert found.shape == (20, 30, 3)
    with monkeypatch.context() as patch:
        streams(patch, stream.getvalue())
        assert run(session, "-", tmp_path / "b.png") == [tmp_path / "b.png"]
    if kind != "JPEG":
        assert np.array_equal(read_image(tmp_path / "b.png").pixels, found.pixels)


def test_standard_input_that_is_no_image_is_refused(tmp_path, session, monkeypatch):
    for data, message in ((b"", "no bytes"), (b"hello", "b'hell' at its start"), (b"\0" * 99, "expected an")):
        with monkeypatch.context() as patch:
            streams(patch, data)
            with pytest.raises(ImageError, match=f"standard input: found .*{message}"):
                run(session, "-", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_standard_input_has_the_limit_of_files(tmp_path, session, monkeypatch):
    data = encoded((picture(64, 64) * 255).astype(np.uint8), "PNG")
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 64)
    streams(monkeypatch, data)
    with pytest.raises(ImageError, match="standard input: found more than 64 bytes, expected at most that"):
        run(session, "-", tmp_path / "out.png")


def test_an_empty_name_is_not_the_working_directory(tmp_path, session, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", picture(64, 64))
    for images, out in (("", "out"), (["a.png", ""], "out"), ("a.png", "")):
        with pytest.raises(UsageError, match="found an empty name, expected"):
            run(session, images, out)
    assert set(os.listdir(tmp_path)) == {"a.png", "bundle"}


def test_a_full_disk_leaves_no_part_and_says_why(tmp_path, session):
    path = save(tmp_path / "a.png", picture(64, 64))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))  # bytes that a file may have
    try:
        with pytest.raises(UsageError, match=r"cannot write .*a\.png"):
            run(session, path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_image(tmp_path, session):
    image, tiles_done = save(tmp_path / "a.png", picture(20, 30)), []
    with pytest.raises(UsageError, match=r"cannot write /proc/a\.png"):
        run(session, image, "/proc", progress=lambda *state: tiles_done.append(state))
    assert tiles_done == []
