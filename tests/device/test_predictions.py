"""Bundles that predict: labels in a build, and classes and keypoints of photos of any size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

import edgedyn
from edgedyn.bundle.manifest import MANIFEST, canonical, seal
from edgedyn.cli.app import execute
from edgedyn.device.predictions import predict
from edgedyn.errors import BundleError, CalibrationError, ImageError
from edgedyn.recipe.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
CLASSES = ["black", "red", "gray", "green", "white", "blue", "none"]


def tinted(colour: int, seed: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    """Part of a photo in which one colour is brighter by half."""
    whole, rng = skimage.data.astronaut().astype(float), np.random.default_rng(seed)
    top, left = rng.integers(200), rng.integers(200)
    part = whole[top : top + size[0], left : left + size[1]]
    gray = 0.5 * part.mean(axis=2, keepdims=True).repeat(3, axis=2)
    gray[:, :, colour] *= 1.5
    return gray.clip(0, 255).astype(np.uint8)


def photos(folder: Path, *, seed: int, names: tuple[str, ...] = ("red", "green", "blue")) -> Path:
    for colour, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(tinted(colour, 10 * seed + k)).save(folder / name / f"{k}.png")
    return folder


def recipe(network: str, task: str, *overrides: str, base: str = "ddf-resnet50.phone.int8.yaml") -> Recipe:
    return load_recipe(
        RECIPES / base,
        [
            f"model.network=small_networks:{network}",
            "model.arguments={}",
            f"task={task}",
            "input.shape=[1, 3, 32, 32]",
            "quantize.rounding=nearest",
            "limits.int8_share=0",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> edgedyn.pipeline.Build:
    folder = tmp_path_factory.mktemp("labels")
    names = folder / "classes.txt"
    names.write_text("\n".join(CLASSES))
    sets = []
    for seed, name in enumerate(("calibration", "validation")):
        photos(folder / name, seed=seed)
        command = ["calibrate", "--make-manifest", str(folder / name), "-o", str(folder / f"{name}.yaml")]
        assert execute([*command, "--set", f"classes={names}"]) == 0
        sets.append(f"{name}={folder / name}.yaml")
    return edgedyn.build(recipe("ColourClasses", "classify", *sets), folder / "out")


def test_a_build_with_labels_has_their_accuracy(classifier):
    rows = {f"{row.between} {row.metric}": row for row in classifier.report.rows if "labels" in row.between}
    assert {name: row.value for name, row in rows.items()} == {
        "float:labels top1_accuracy": 1.0,
        "float:labels top5_accuracy": 1.0,
        "device:labels top1_accuracy": 1.0,
        "device:labels top5_accuracy": 1.0,
        "device:labels top1_drop": 0.0,
        "device:labels top5_drop": 0.0,
    }
    assert {row.samples for row in rows.values()} == {6}
    assert classifier.bundle.predictions == {"task": "classify", "short_side": 0, "classes": CLASSES}


def test_run_prints_the_classes_of_photos_of_any_size(classifier, tmp_path, capsys):
    blue, gray = tmp_path / "blue.png", tmp_path / "gray.jpg"
    Image.fromarray(tinted(2, 7, (90, 200))).save(blue)
    Image.fromarray(tinted(2, 7)[:, :, 0]).save(gray)
    assert execute(["run", str(classifier.bundle.path), str(blue), str(gray), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in printed["images"]] == [str(blue), str(gray)]
    best = printed["images"][0]["classes"]
    assert (best[0]["index"], best[0]["name"]) == (5, "blue")
    assert len(best) == 5
    assert [seen["probability"] for seen in best] == sorted((s["probability"] for s in best), reverse=True)
    assert 0.5 < sum(seen["probability"] for seen in best) <= 1
    assert execute(["run", str(classifier.bundle.path), str(blue)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(blue)
    assert lines[1].endswith("%  blue")


def test_probabilities_are_the_softmax_of_the_program(classifier, tmp_path):
    image = tmp_path / "a.png"
    pixels = tinted(1, 3, (32, 32))
    Image.fromarray(pixels).save(image)
    session = edgedyn.open_session(classifier.bundle.path)
    chw = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(255)
    logits = session.run(chw)[0][0].astype(float)
    expected = np.exp(logits) / np.exp(logits).sum()
    for seen in predict(session, image)["classes"]:
        assert seen["probability"] == pytest.approx(expected[seen["index"]], rel=1e-9)


def test_a_damaged_photo_stops_no_other_one(classifier, tmp_path, capsys):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(tinted(0, 1)).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    assert execute(["run", str(classifier.bundle.path), str(bad), str(good), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["ok"]
    assert printed["images"][0]["error"]["type"] == "ImageError"
    assert printed["images"][1]["classes"][0]["name"] == "red"
    with pytest.raises(ImageError):
        predict(edgedyn.open_session(classifier.bundle.path), bad)


def test_class_names_of_another_number_are_refused_before_calibration(tmp_path):
    for seed, name in enumerate(("a", "b")):
        photos(tmp_path / name, seed=seed)
    sets = [f"calibration={tmp_path / 'a'}", f"validation={tmp_path / 'b'}"]
    given = recipe("ColourClasses", "classify", *sets)
    with pytest.raises(CalibrationError, match=r"names 3 classes, such as 'blue', and .* 7 logits"):
        edgedyn.build(given, tmp_path / "out")


def spots(at: list[tuple[int, int]], size: tuple[int, int]) -> np.ndarray:
    """Dark waves with one bright square per colour; ``at`` has the row and column of its centre."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([20 + 15 * np.sin(x / 9 + c) + 5 * np.sin(y / 5) for c in range(3)], axis=2)
    for colour, (row, column) in enumerate(at):
        image[row - 6 : row + 6, column - 6 : column + 6, colour] = 250
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def spotter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keypoints")
    for name, seed in (("calibration", 0), ("validation", 1)):
        (folder / name).mkdir()
        for k in range(4):
            Image.fromarray(spots([(20 + 9 * k, 20 + seed)] * 3, (64, 64))).save(folder / name / f"{k}.png")
        command = ["calibrate", "--make-manifest", str(folder / name), "-o", str(folder / f"{name}.yaml")]
        assert execute([*command, "--set", "noise.kind=none", "--set", "short_side=32"]) == 0
    sets = [f"{name}={folder / name}.yaml" for name in ("calibration", "validation")]
    edgedyn.build(recipe("BrightSpots", "keypoints", *sets, "precision=fp32"), folder / "out")
    return folder / "out"


def test_keypoints_are_positions_in_the_photo(spotter, tmp_path, capsys):
    photo = tmp_path / "spots.png"
    at = [(40, 100), (150, 260), (90, 180)]
    Image.fromarray(spots(at, (192, 384))).save(photo)  # 6 times as high as the input, and cut at both ends
    assert execute(["run", str(spotter), str(photo), "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["images"]
    cell = 192 / 32 * 4  # pixels of the photo per pixel of a heatmap
    for seen, (row, column) in zip(printed["keypoints"], at, strict=True):
        assert abs(seen["x"] - (column - 0.5)) <= cell / 2 + 6
        assert abs(seen["y"] - (row - 0.5)) <= cell / 2 + 6
        assert 0 < seen["score"] <= 1
    assert execute(["run", str(spotter), str(photo)]) == 0
    assert "  0  x " in capsys.readouterr().out


def test_a_keypoint_of_an_unresized_photo_is_the_centre_of_its_cell(spotter, tmp_path):
    photo = tmp_path / "spots.png"
    Image.fromarray(spots([(10, 22), (26, 6), (14, 14)], (32, 32))).save(photo)
    (first, *_) = predict(edgedyn.open_session(spotter), photo)["keypoints"]
    assert first["x"] % 4 == first["y"] % 4 == 1.5  # pixels 4k to 4k + 3
    assert abs(first["x"] - 21.5) <= 6
    assert abs(first["y"] - 9.5) <= 6


def test_a_very_long_photo_is_cut_to_its_middle(spotter, tmp_path):
    photo = tmp_path / "strip.png"
    Image.fromarray(spots([(8, 4000)] * 3, (16, 8000))).save(photo)
    (first, *_) = predict(edgedyn.open_session(spotter), photo)["keypoints"]
    assert abs(first["x"] - 3999.5) <= 6
    assert abs(first["y"] - 7.5) <= 6


def change(bundle: Path, copy: Path, **predictions: object) -> Path:
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["predictions"] |= predictions
    (copy / MANIFEST).write_bytes(canonical(seal(manifest)))
    return copy


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "denoise"},
        {"short_side": -1},
        {"short_side": 2**20},
        {"short_side": True},
        {"classes": [1]},
        {"classes": "cat"},
    ],
)
def test_a_wrong_contract_of_predictions_is_refused(spotter, tmp_path, wrong):
    with pytest.raises(BundleError, match="predictions"):
        edgedyn.open_bundle(change(spotter, tmp_path / "copy", **wrong))


def test_a_contract_that_does_not_fit_the_program_is_refused(spotter, classifier, tmp_path):
    photo = tmp_path / "a.png"
    Image.fromarray(tinted(0, 1)).save(photo)
    with pytest.raises(BundleError, match="expected one"):
        predict(edgedyn.open_session(change(spotter, tmp_path / "1", task="classify")), photo)
    few = change(classifier.bundle.path, tmp_path / "2", classes=["a"])
    with pytest.raises(BundleError, match="found 1 class names, expected 7"):
        predict(edgedyn.open_session(few), photo)
