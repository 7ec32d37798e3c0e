"""Folders of photos, of noisy and clean ones, and of classes; the manifests that are written of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_sets import digest, save_image, waves

from edgedyn.cli.app import execute
from edgedyn.cli.set_manifest import write_manifest
from edgedyn.errors import CalibrationError, RecipeError, UsageError
from edgedyn.images.draft import make_manifest
from edgedyn.images.folder import list_folder
from edgedyn.images.framing import frame
from edgedyn.images.image_set import open_set
from edgedyn.images.tasks import TASKS

SHAPE = (1, 3, 32, 48)


def photos(folder: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(folder / name, seed=k)
    return folder


def noisy(path: Path, *, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 20, (90, 70, 3))
    Image.fromarray((waves(seed) + noise).clip(0, 255).astype(np.uint8)).save(path)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def names_of(folder: Path, **options) -> list[tuple[str, str]]:
    found = list_folder(folder, **options).images
    return [(x.path.relative_to(folder).as_posix(), x.clean.name if x.clean else "") for x in found]


@pytest.mark.parametrize(
    ("noisy_name", "clean_name"),
    [
        ("a_noisy.png", "a_clean.png"),
        ("0001_NOISY_SRGB_010.PNG", "0001_GT_SRGB_010.PNG"),
        ("Canon_5_plug_11_real.JPG", "Canon_5_plug_11_mean.JPG"),
        ("noisy-b.png", "clean-b.jpg"),
        ("b.noisy.1.png", "b.gt.1.png"),
        ("noisy/b.png", "clean/b.png"),
        ("scene/noisy 1.png", "scene/clean 1.png"),
    ],
)
def test_photos_whose_names_differ_in_one_word_are_pairs(tmp_path, noisy_name, clean_name):
    photos(tmp_path, noisy_name, clean_name)
    listing = list_folder(tmp_path)
    assert [(x.path.name, x.clean.name) for x in listing.images] == [
        (Path(noisy_name).name, Path(clean_name).name)
    ]
    assert listing.noise.kind == "real"


@pytest.mark.parametrize(
    "names",
    [("real_madrid.png", "b.png"), ("noisyb.png", "cleanb.png"), ("a_gt.png", "a_real.png"), ("a.png",)],
)
def test_other_photos_are_clean_ones(tmp_path, names):
    listing = list_folder(photos(tmp_path, *names))
    assert [x.path.name for x in listing.images] == sorted(names)
    assert listing.noise.sigma == [15.0, 25.0, 50.0]
    assert all(x.clean is None and x.label is None for x in listing.images)


def test_a_photo_outside_the_pairs_is_refused_by_name(tmp_path):
    photos(tmp_path, "a_noisy.png", "a_clean.png", "c.png")
    with pytest.raises(CalibrationError, match=r"1 pairs.*1 other images \(c\.png\)"):
        list_folder(tmp_path)


def test_a_folder_of_clean_photos_pairs_by_name_with_any_suffix(tmp_path):
    photos(tmp_path / "n", "a.png", "b.png")
    photos(tmp_path / "c", "a.jpg", "b.png", "more.png")
    assert names_of(tmp_path / "n", beside=tmp_path / "c") == [("a.png", "a.jpg"), ("b.png", "b.png")]
    assert list_folder(tmp_path / "n", tmp_path / "c").noise.kind == "real"
    photos(tmp_path / "c", "a.png")
    with pytest.raises(CalibrationError, match=r"1 of 2 images .* \(a\.png\)"):
        list_folder(tmp_path / "n", tmp_path / "c")


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    photos(tmp_path, "dog/x.png", "cat/y.png", "cat/deep/z.png")
    listing = list_folder(tmp_path)
    assert listing.classes == ("cat", "dog")
    labels = {x.path.name: x.label for x in listing.images}
    assert labels == {"x.png": 1, "y.png": 0, "z.png": 0}
    assert listing.noise.kind == "none"


def test_given_classes_set_the_order_of_the_logits(tmp_path):
    photos(tmp_path, "dog/x.png", "cat/y.png")
    listing = list_folder(tmp_path, classes=["owl", "dog", "cat"])
    assert [(x.path.name, x.label) for x in listing.images] == [("y.png", 2), ("x.png", 1)]
    with pytest.raises(CalibrationError, match="class 'dog'; did you mean 'dogs'"):
        list_folder(tmp_path, classes=["cat", "dogs"])


def test_numbers_are_indices_unless_their_sorted_order_is_another(tmp_path):
    photos(tmp_path / "a", "3/x.png", "7/y.png")
    assert [x.label for x in list_folder(tmp_path / "a").images] == [3, 7]
    photos(tmp_path / "b", "2/x.png", "10/y.png")
    with pytest.raises(CalibrationError, match="numbers 10, 2"):
        list_folder(tmp_path / "b")
    listing = list_folder(tmp_path / "b", classes=["2", "10"])
    assert {x.path.parent.name: x.label for x in listing.images} == {"2": 0, "10": 1}


@pytest.mark.parametrize("header", [["file,class"], ["filename,label"], []])
def test_a_csv_file_gives_classes(tmp_path, header):
    photos(tmp_path, "a.png", "b, c.png", "unlisted.png")
    table(tmp_path / "labels.csv", *header, "a.png,dog", '"b, c.png",cat', "")
    listing = list_folder(tmp_path)
    assert [(x.path.name, x.label) for x in listing.images] == [("a.png", 1), ("b, c.png", 0)]
    assert listing.classes == ("cat", "dog")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_any_ends_and_empty_ones_are_read(tmp_path, end):
    photos(tmp_path, "a.png", "b.png")
    text = end.join(["", "File,Class", "a.png, dog ", ",", 'b.png,"cat, ""big"""', "  ", ""])
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    listing = list_folder(tmp_path)
    assert [(x.path.name, x.label) for x in listing.images] == [("a.png", 1), ("b.png", 0)]
    assert listing.classes == ('cat, "big"', "dog")


def test_folders_without_images_are_classes_and_hidden_ones_are_not(tmp_path):
    photos(tmp_path, "dog/x.png", "ant/y.png", ".cache/z.png", "dog/.cache/z.png", "dog/.z.png")
    (tmp_path / "cat").mkdir()
    listing = list_folder(tmp_path)
    assert listing.classes == ("ant", "cat", "dog")
    assert [(x.path.name, x.label) for x in listing.images] == [("y.png", 0), ("x.png", 2)]


def test_numbers_of_a_csv_file_are_indices(tmp_path):
    photos(tmp_path, "a.png", "b.png")
    rows = table(tmp_path / "elsewhere.csv", "a.png,10", "b.png,2")
    listing = list_folder(tmp_path, rows)
    assert [x.label for x in listing.images] == [10, 2]
    assert listing.classes == ()


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["a.png"], "line 1: 'a.png' is no line"),
        (["a.png,x", "a.png,y"], "line 2: 'a.png,y' is listed twice"),
        (["a.png,x", "./a.png,y"], "line 2: './a.png,y' is listed twice"),
        (["a.png,x,y"], "line 1: 'a.png,x,y' is no line"),
        (["", "file,class", "gone.png,x"], "line 3: 'gone.png,x' names no file"),
        (['a.png,"x', 'y"'], "line 2: .* control character"),
        (["a.png,1.0"], "are the numbers 1.0; expected whole numbers from 0"),
        (["a.png,-1"], "are the numbers -1; expected whole numbers from 0"),
        (["a.png,"], "line 1"),
        (["../a.png,x"], "line 1"),
        (["/etc/passwd,x"], "line 1"),
        (["file,class"], "name no image"),
        ([""], "name no image"),
        (['a.png,"x'], "cannot be read"),
    ],
)
def test_wrong_lines_of_a_csv_file_are_refused(tmp_path, lines, named):
    photos(tmp_path / "f", "a.png")
    photos(tmp_path, "a.png")
    with pytest.raises(CalibrationError, match=named):
        list_folder(tmp_path / "f", table(tmp_path / "t.csv", *lines))


def test_a_manifest_of_pairs_draws_as_the_pairs_do(tmp_path):
    for k in range(3):
        noisy(tmp_path / f"p/{k}_noisy.png", seed=k)
        save_image(tmp_path / f"p/{k}_clean.png", seed=k)
    (tmp_path / "calib").mkdir()
    out = tmp_path / "calib/pairs.yaml"
    calls = []
    made = make_manifest(tmp_path / "p", out, progress=lambda *x: calls.append(x))
    assert calls == [("hash", k, 3) for k in (1, 2, 3)]
    opened = open_set(out)
    assert (opened.name, opened.noise.kind, opened.samples) == ("pairs", "real", 12)
    assert [(i.path.name, i.clean.path.name) for i in opened.images] == [
        (f"{k}_noisy.png", f"{k}_clean.png") for k in range(3)
    ]
    assert made.files[0].sha256 == digest(tmp_path / "p/0_noisy.png")
    for a, b in zip(opened.draw([SHAPE]), open_set(tmp_path / "p").draw([SHAPE]), strict=True):
        assert a.has_truth
        np.testing.assert_array_equal(a.noisy, b.noisy)
        np.testing.assert_array_equal(a.truth, b.truth)


def test_a_manifest_and_its_folder_move_together(tmp_path):
    photos(tmp_path / "a/photos", "x.png", "y.png")
    make_manifest(tmp_path / "a/photos", tmp_path / "a/set.yaml")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert len(open_set(tmp_path / "b/set.yaml").images) == 2
    save_image(tmp_path / "b/photos/x.png", seed=5)
    with pytest.raises(CalibrationError, match=r"x\.png has sha256"):
        open_set(tmp_path / "b/set.yaml")


def test_a_manifest_of_classes_has_every_file_once(tmp_path):
    photos(tmp_path / "f", *(f"{name}/{k}.png" for name in ("no", "1e5") for k in range(7)))
    make_manifest(tmp_path / "f", tmp_path / "s.yaml")
    opened = open_set(tmp_path / "s.yaml")
    assert opened.classes == ("1e5", "no")  # YAML would read a number and a falsehood
    samples = list(opened.draw([SHAPE], TASKS["classify"]))
    assert [s.label for s in samples] == [0] * 7 + [1] * 7
    assert samples[0].classes == ("1e5", "no")


def test_the_crop_of_a_labelled_photo_is_its_centre(tmp_path):
    photos(tmp_path / "f", "a/x.png")
    make_manifest(tmp_path / "f", tmp_path / "s.yaml", values={"short_side": 60})
    (sample,) = open_set(tmp_path / "s.yaml").draw([SHAPE], TASKS["classify"])
    photo = np.asarray(Image.open(tmp_path / "f/a/x.png"), np.float32) / 255
    small = np.asarray(Image.fromarray(photo[:, :, 0]).resize((60, 77), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(sample.noisy[0, 0], small[22:54, 6:54])
    assert sample.short_side == 60
    (covering,) = open_set(tmp_path / "f").draw([SHAPE], TASKS["classify"])
    small = np.asarray(Image.fromarray(photo[:, :, 0]).resize((48, 62), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(covering.noisy[0, 0], small[15:47])


@pytest.mark.parametrize("size", [(20, 30), (90, 70), (33, 49), (32, 48), (31, 300)])
def test_without_a_short_side_a_photo_covers_the_crop(size):
    framed = frame(waves(size=size).astype(np.float32) / 255, (32, 48))
    assert framed.pixels.shape == SHAPE
    height, width = (round(s * f) for s, f in zip(size, framed.scale, strict=True))
    assert height >= 32
    assert width >= 48
    assert height <= 33 or width <= 49


def test_a_rounding_of_the_scale_adds_no_pixel():
    # 293 * (224 / 293) is 224.00000000000003
    framed = frame(np.zeros((293, 400, 1), np.float32), (224, 224))
    assert framed.scale[0] == 224 / 293
    assert framed.top == 0


def test_a_position_in_the_crop_is_one_in_the_photo():
    framed = frame(np.zeros((40, 80, 1), np.float32), (20, 30))
    # half the size, 5 columns on the left cut off; the centre of 2 x 2 pixels is between them
    assert framed.to_photo(0, 0) == (10.5, 0.5)
    assert framed.to_photo(29, 19) == (68.5, 38.5)


def test_values_take_the_place_of_the_found_ones(tmp_path):
    photos(tmp_path / "f", "dog/x.png", "cat/y.png")
    names = table(tmp_path / "names.txt", "owl", "dog", "cat", "")
    values = {"licence": "CC0", "samples": 1, "classes": str(names)}
    made = make_manifest(tmp_path / "f", tmp_path / "s.yaml", values=values)
    assert (made.licence, made.drawn, made.classes) == ("CC0", 1, ["owl", "dog", "cat"])
    assert [made.label_of(file) for file in made.files] == [2, 1]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"short_sde": 3}, "did you mean 'short_side'"),
        ({"noise": {"kind": "gausian"}}, "did you mean 'gaussian'"),
        ({"samples": 5}, "2 labelled files give one sample each"),
        ({"classes": ["cat", "dog", "cat"]}, "names cat twice"),
        ({"classes": "gone.txt"}, "gone.txt cannot be read"),
        ({3: 4}, "keyword"),
    ],
)
def test_wrong_values_are_refused_before_files_are_read(tmp_path, values, named, monkeypatch):
    photos(tmp_path / "f", "dog/x.png", "cat/y.png")
    monkeypatch.setattr("edgedyn.images.draft.hash_file", lambda *x: pytest.fail("a file was read"))
    with pytest.raises(CalibrationError, match=named):
        make_manifest(tmp_path / "f", tmp_path / "s.yaml", values=values)
    assert not (tmp_path / "s.yaml").exists()


def manifest(folder: Path, **changes) -> Path:
    photos(folder, "a.png", "b.png")
    files = [{"name": n, "sha256": digest(folder / n), "label": k} for k, n in enumerate(("a.png", "b.png"))]
    values = {
        "name": "s",
        "licence": "CC0",
        "root": ".",
        "noise": {"kind": "none"},
        "files": files,
        **changes,
    }
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("labels", "classes", "named"),
    [
        ([0, None], [], "1 of 2 files have no label"),
        (["cat", "dgo"], ["cat", "dog"], "did you mean 'dog'"),
        ([0, 2], ["cat", "dog"], "has the label 2"),
        ([0, -1], [], "has the label -1"),
        (["cat", "dog"], [], "0 names of classes"),
        ([0, True], ["cat", "dog"], "label"),
    ],
)
def test_wrong_labels_of_a_manifest_are_refused(tmp_path, labels, classes, named):
    path = manifest(tmp_path)
    values = yaml.safe_load(path.read_text())
    for file, label in zip(values["files"], labels, strict=True):
        file["label"] = label
    path.write_text(yaml.safe_dump({**values, "classes": classes}))
    with pytest.raises(CalibrationError, match=named):
        open_set(path)


def test_the_command_writes_a_manifest_that_opens(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "f", "a.png", "b.png")
    command = ["calibrate", "--make-manifest", "f", "-o", "s.yaml", "--set", "licence=CC0", "--json"]
    assert execute([*command, "--set", "noise.kind=none"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["files"], printed["noise"]) == (2, {"kind": "none"})
    assert open_set(tmp_path / "s.yaml").licence == "CC0"
    assert execute(command) == 2
    assert "exists already" in capsys.readouterr().out
    assert execute([*command, "--force", "--clean", "gone"]) == 5
    assert execute(["calibrate", "-o", "t.json"]) == 2
    assert execute(["calibrate", "r.yaml", "-o", "t.json", "--labels", "f"]) == 2
    table(tmp_path / "l.csv", "a.png,dog", "b.png,cat")
    assert execute(["calibrate", "--make-manifest", "f", "-o", "l.yaml", "--labels", "l.csv"]) == 0
    assert open_set(tmp_path / "l.yaml").classes == ("cat", "dog")
    assert "2 files, 2 labels, 2 classes, 2 samples" in capsys.readouterr().out


def test_other_wrong_uses_are_refused(tmp_path):
    with pytest.raises(CalibrationError, match="is no folder"):
        make_manifest(tmp_path / "gone", tmp_path / "s.yaml")
    with pytest.raises(CalibrationError, match="holds no image"):
        make_manifest(tmp_path, tmp_path / "s.yaml")
    photos(tmp_path, "a.png")
    (tmp_path / "s.yaml").touch()
    with pytest.raises(UsageError, match="exists already"):
        make_manifest(tmp_path, tmp_path / "s.yaml")
    with pytest.raises(RecipeError, match="no override"):
        write_manifest(tmp_path, tmp_path / "t.yaml", None, ["noise"], force=False, as_json=False)
