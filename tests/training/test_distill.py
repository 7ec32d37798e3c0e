"""Distillation by a recipe: it learns, resumes bit by bit, keeps the last good checkpoint; its refusals."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train as tool
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from edgedyn.errors import RecipeError, TrainingError, UsageError, WeightsError
from edgedyn.models.ffdnet import FFDNet
from edgedyn.recipe.networks import find_network
from edgedyn.sections import dump_yaml
from edgedyn.training.denoise import Batch, charbonnier, learning_rate
from edgedyn.training.distill import Distillation
from edgedyn.training.recipe import load_training_recipe
from edgedyn.training.run import Result, Table, run_recipe, validation_images


class StopError(Exception):
    """The power is cut."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three photos to train on, two held out, and a teacher, FFDNet of 8 channels: a gray fog."""
    folder = tmp_path_factory.mktemp("data")
    y, x = np.mgrid[:40, :48]
    for k in range(5):
        (folder / ("train", "val")[k > 2]).mkdir(exist_ok=True)
        waves = np.sin((x * (k + 1) + 2 * y) / 6)
        pixels = (127 + 60 * np.stack([waves, 0.5 * waves, -waves], 2)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("train", "val")[k > 2] / f"{k}.png")
    torch.manual_seed(9)
    teacher = FFDNet(channels=8)
    nn.init.constant_(teacher.model[-1].bias, 0.5)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    return folder


def values(**changes) -> dict:
    plan = {"steps": 12, "batch": 2, "patch": 16, "warmup": 2, "ema": 0.5, "learning_rate": 1e-3}
    return {
        "model": {"network": "malle_ffdnet", "arguments": {"channels": 4}},
        "teacher": {
            "network": "ffdnet",
            "arguments": {"channels": 8},
            "weights": "teacher.safetensors",
            "licence": "made by a test",
        },
        "cut": {"batches": 2},
        "images": ["train"],
        "validation": [{"name": "waves", "folder": "val", "crop": 32, "color_augmented": True}],
        "sigmas": [25.0],
        "plan": {
            **plan,
            "freeze_norms": 0,
            "fresh": ["malle."],
            "fresh_rate": 4.0,
            **changes.pop("plan", {}),
        },
        "checkpoint_every": 4,
        "validate_every": 5,
        **changes,
    }


def write(path: Path, **changes) -> Path:
    path.write_text(dump_yaml(values(**changes)))
    return path


def run(tmp_path: Path, data: Path, *, stop_at: int = -1, **changes) -> list[Result]:
    recipe = load_training_recipe(write(tmp_path / "tiny.yaml", **changes))
    results: list[Result] = []

    def report(step: int, loss: float) -> None:
        if step == stop_at:
            raise StopError

    run_recipe(recipe, data, tmp_path / "out", results.append, report)
    return results


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("stop_at", [2, 6, 9])
def test_interrupted_run_ends_with_the_same_weights_and_the_same_log(tmp_path, data, stop_at):
    ends = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        if name == "cut":
            with pytest.raises(StopError):
                run(tmp_path / name, data, stop_at=stop_at)
        ends.append(run(tmp_path / name, data)[-1])
    one, two = (end.network.state_dict() for end in ends)
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [rows(tmp_path / name / "out/log.csv") for name in ("whole", "cut")]
    assert [row[:3] for row in logs[0]] == [row[:3] for row in logs[1]]
    assert [row[0] for row in logs[1]] == ["step", *map(str, range(1, 13))]
    assert rows(tmp_path / "whole/out/validation.csv") == rows(tmp_path / "cut/out/validation.csv")


def test_log_has_loss_rate_and_seconds_and_the_validation_its_steps(tmp_path, data):
    results = run(tmp_path, data)
    last = results[-1]
    log, validation = rows(tmp_path / "out/log.csv"), rows(tmp_path / "out/validation.csv")
    plan = load_training_recipe(tmp_path / "tiny.yaml").plan.plan()
    assert log[0] == ["step", "loss", "learning_rate", "seconds"]
    assert float(log[7][2]) == pytest.approx(learning_rate(plan, 6), rel=1e-3)
    assert [row[0] for row in validation] == ["step", "0", "5", "10", "12"]
    assert float(validation[-1][1]) == pytest.approx(last.psnr_db["waves sigma=25"], abs=1e-3)
    assert [result.step for result in results] == [5, 10, 12]  # the held-out PSNR chooses none of them
    assert last.teacher_psnr_db.keys() == last.psnr_db.keys()


def test_distillation_lowers_the_loss(tmp_path, data):
    run(tmp_path, data, cut=None, plan={"steps": 60, "learning_rate": 3e-3, "recolor": 0.0})
    losses = [float(row[1]) for row in rows(tmp_path / "out/log.csv")[1:]]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_the_loss_blends_teacher_and_clean_image():
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    teacher = nn.Conv2d(3, 3, 1)
    batch = Batch(x, y, torch.tensor([5.0, 9.0]))
    with torch.no_grad():
        expected = 0.7 * charbonnier(x, teacher(x)) + 0.3 * charbonnier(x, y)
    torch.testing.assert_close(Distillation(teacher, 0.7)(x, batch), expected)
    torch.testing.assert_close(Distillation(teacher, 0.0)(x, batch), charbonnier(x, y))


def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path, data, monkeypatch):
    calls = []

    def spoil(self, y, batch):
        calls.append(1)
        return y.mean() * (math.nan if len(calls) == 7 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "__call__", spoil)
        with pytest.raises(TrainingError, match=r"the loss is nan at step 6\. Lower the learning rate"):
            run(tmp_path, data)
    saved = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(t.isfinite().all() for t in (*saved["model"].values(), *saved["averaged"].values()))
    assert run(tmp_path, data)[-1].step == 12


def test_training_begins_with_the_cut_teacher(tmp_path, data):
    """All channels kept, no step of any size: the student is its teacher."""
    same = {"network": "malle_ffdnet", "arguments": {"channels": 8}}
    (*_, last) = run(tmp_path, data, model=same, plan={"steps": 1, "learning_rate": 1e-12})
    assert last.psnr_db == pytest.approx(last.teacher_psnr_db, abs=1e-4)


def test_training_continues_from_published_weights(tmp_path, data):
    (*_, last) = run(tmp_path, data)
    state = {name: tensor.contiguous() for name, tensor in last.network.state_dict().items()}
    save_file(state, tmp_path / "first.safetensors")
    (tmp_path / "again").mkdir()
    recipe = {"start_from": "../first.safetensors", "plan": {"steps": 1, "learning_rate": 1e-12}}
    (*_, again) = run(tmp_path / "again", data, **recipe)
    assert again.psnr_db == pytest.approx(last.psnr_db, abs=1e-4)


def test_validation_images_are_centre_crops_of_every_nth(data):
    (section,) = load_training_recipe(write(data / "r.yaml")).validation
    crops = validation_images(section.model_copy(update={"every": 2, "color_augmented": False}), data)
    assert [tuple(crop.shape) for crop in crops] == [(1, 3, 32, 32)]
    photo = np.asarray(Image.open(data / "val/3.png"))[4:36, 8:40]
    assert np.array_equal((crops[0][0] * 255).byte().permute(1, 2, 0).numpy(), photo)
    assert validation_images(section, data)[0].ne(crops[0]).any()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"plam": {}}, r"unknown key 'plam'; did you mean 'plan'\?"),
        ({"plan": {"stepps": 3}}, r"unknown key 'plan\.stepps'; did you mean 'steps'\?"),
        ({"plan": {"halve": 1.5}}, r"plan\.halve is 1\.5: Input should be less than or equal to 1"),
        ({"plan": {"sigma": [50.0, 5.0]}}, r"sigma is \[50\.0, 5\.0\]; expected \[low, high\]"),
        ({"images": ["val"]}, r"\['val'\] are in images and in validation"),
        ({"model": {"arguments": {}}}, r"the key 'model\.network' is missing"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=f"training recipe .*tiny.yaml: .*{text}"):
        load_training_recipe(write(tmp_path / "tiny.yaml", **changes))


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "holds list"), ("a: [", "is not YAML"), ("", "holds NoneType")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_training_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file"):
        load_training_recipe(tmp_path / "none.yaml")


def test_a_chain_that_is_none_and_weights_of_another_network_are_refused(tmp_path, data):
    with pytest.raises(TrainingError, match=r"MalleFFDNet has ModuleList at cut\.chain 'malle'; expected an"):
        run(tmp_path, data, cut={"chain": "malle"})
    with pytest.raises(WeightsError, match="do not fit FFDNet"):
        run(tmp_path, data, teacher={**values()["teacher"], "arguments": {"channels": 9}})


def test_a_table_drops_the_rows_that_come_again(tmp_path):
    table = Table(tmp_path / "t.csv", ["step", "x"])
    for step in (1, 2, 3):
        table.append(step, step * 10)
    again = Table(tmp_path / "t.csv", ["step", "x"])
    assert again.last(before=3, column=1) == 20
    again.append(2, 21)
    assert rows(tmp_path / "t.csv") == [["step", "x"], ["1", "10"], ["2", "21"]]
    assert Table(tmp_path / "u.csv", ["step", "x"]).last(before=9, column=1) == 0


def command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(SystemExit) as leaving:
        tool.typer.run(tool.main)
    return int(leaving.value.code or 0)


def test_the_tool_writes_weights_and_a_card(tmp_path, data, monkeypatch):
    recipe, out = write(tmp_path / "tiny.yaml"), tmp_path / "new/tiny.safetensors"
    assert command(monkeypatch, recipe, "--data", data, "--out", out, "--threads", "1") == 0
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["licence"] == "made by a test"
    assert (card["recipe"], card["step"], card["plan"]["steps"]) == ("tiny", 12, 12)
    assert card["psnr_db"].keys() == card["teacher_psnr_db"].keys() == {"waves sigma=25"}
    assert card["plan"]["fresh"] == ["malle."]
    assert str(tmp_path) not in json.dumps(card)
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    find_network(card["network"])(**card["arguments"]).load_state_dict(state)
    assert (tmp_path / "new/tiny.training/checkpoint.pt").exists()


def test_the_queue_resumes_skips_and_goes_on_behind_a_failure(tmp_path, data, monkeypatch, capsys):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("a", "c"):
        write(recipes / f"{name}.yaml")
    write(recipes / "b.yaml", images=["missing"])
    words = ("--queue", recipes, "--data", data, "--checkpoints", tmp_path / "out", "--threads", "1")
    recipe = load_training_recipe(recipes / "c.yaml")

    def stop(step: int, loss: float) -> None:
        if step == 9:
            raise StopError

    with pytest.raises(StopError):
        run_recipe(recipe, data, tmp_path / "out/c", lambda result: None, stop)
    steps = rows(tmp_path / "out/c/log.csv")[5]
    assert command(monkeypatch, *words) == 2
    text = capsys.readouterr()
    assert "no images in" in text.err
    assert "finished" not in text.out
    assert rows(tmp_path / "out/c/log.csv")[5] == steps, "resumed from step 8: row 5 was not written again"
    weights = [(tmp_path / f"out/{name}/{name}.safetensors").read_bytes() for name in ("a", "c")]
    assert weights[0] == weights[1]
    assert command(monkeypatch, *words) == 2
    assert capsys.readouterr().out.count("finished: ") == 2


def test_weights_of_an_interrupted_run_are_not_taken_for_finished(tmp_path, data, monkeypatch, capsys):
    recipe, out = load_training_recipe(write(tmp_path / "tiny.yaml")), tmp_path / "tiny.safetensors"

    def stop(step: int, loss: float) -> None:
        if step == 9:
            raise StopError

    with pytest.raises(StopError):
        run_recipe(recipe, data, tmp_path / "out", lambda result: tool.write(recipe, result, out), stop)
    assert json.loads(out.with_suffix(".json").read_text())["step"] == 10
    words = (tmp_path / "tiny.yaml", "--data", data, "--out", out, "--checkpoint", tmp_path / "out")
    assert command(monkeypatch, *words, "--threads", "1") == 0
    assert "finished" not in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text())["step"] == 12


def test_a_queue_may_be_a_list_of_paths(tmp_path):
    (tmp_path / "list.txt").write_text("# first the small one\nb.yaml\n\nsub/a.yaml\n")
    assert tool.queued(tmp_path / "list.txt") == [tmp_path / "b.yaml", tmp_path / "sub/a.yaml"]
    for empty in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="has no recipes; expected a folder of YAML files"):
            tool.queued(empty)


@pytest.mark.parametrize("words", [(), ("r.yaml",), ("--queue", "q"), ("r.yaml", "--queue", "q")])
def test_half_a_command_is_refused(monkeypatch, capsys, words):
    assert command(monkeypatch, *words) == 2
    assert "expected RECIPE and --out, or --queue and --checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((tool.ROOT / "recipes/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_training_recipes_of_the_project_load_and_name_no_folder_of_a_machine(path):
    recipe = load_training_recipe(path)
    assert recipe.name == path.stem
    folders = [*recipe.images, *(section.folder for section in recipe.validation), recipe.teacher.weights]
    assert not [name for name in folders if name.startswith(("/", ".."))]
    assert "MIT" in recipe.teacher.licence
