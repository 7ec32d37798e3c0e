"""``edgedyn init`` writes a recipe that loads, for a network of the user's."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from edgedyn.cli import app as command_line
from edgedyn.cli.init import guess_task
from edgedyn.errors import ModelError
from edgedyn.recipe.recipe import load_recipe

NETWORK = """from edgedyn.layers.malleconv import AffineMalleConv

def make():
    return AffineMalleConv(3, 3, 2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net_of_init.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("net_of_init", None)


def test_a_recipe_is_written_and_loads(folder, capsys):
    arguments = ["init", "net_of_init:make", "-o", "mine.yaml", "--shape", "1,3,48,32", "--precision", "fp32"]
    (folder / "mine.yaml").write_text("my own")
    assert command_line.execute(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "mine.yaml").read_text() == "my own"
    assert command_line.execute([*arguments, "--force", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["recipe"] == "mine.yaml"
    assert [layer["class"] for layer in printed["layers"]] == ["AffineMalleConv"]
    recipe = load_recipe("mine.yaml")
    assert (recipe.name, recipe.target, recipe.precision, recipe.task) == (
        "mine",
        "executorch",
        "fp32",
        "denoise",
    )
    assert recipe.input.shape == [1, 3, 48, 32]
    assert recipe.tile.overlap == 8  # the default would leave nothing of a tile of 32
    assert recipe.path(recipe.calibration).name == "skimage.yaml"
    assert recipe.path(recipe.calibration).is_file()  # of edgedyn itself: the folder has none
    assert recipe.path(recipe.validation).is_file()
    text = (folder / "mine.yaml").read_text()
    assert "AffineMalleConv, sliced_depthwise2d as banded_shift_mac" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net_of_init:make", "--target", "executorh"], "did you mean 'executorch'?"),
        (["net_of_init:make", "--precision", "int9", "--shape", "1,3,32,32"], "did you mean 'int8'?"),
        (["net_of_init:mak"], "cannot be loaded"),
        (["os:getcwd"], "not trusted"),
        (["mallenet"], "expected package.module:function"),
        *(
            (["net_of_init:make", "--shape", shape], "expected four sizes from 1 to 16384")
            for shape in ("1,3", "1,3,\u00b2,2", "1,3,0,2", "1,3,16385,2", f"1,3,2,{'9' * 5000}", "1,3,-2,2")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_recipe_is_refused_and_nothing_is_written(folder, capsys, arguments, words):
    assert command_line.execute(["init", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(folder.glob("*.yaml"))


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (nn.Identity(), "denoise"),
        (nn.Upsample(scale_factor=2), "upscale"),
        (nn.Upsample(scale_factor=3), "upscale"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)), "classify"),
        (nn.Conv2d(3, 5, 3, stride=2), "keypoints"),
    ],
    ids=["same size", "twice as large", "three times as large", "logits", "heatmaps"],
)
def test_the_task_is_guessed_from_the_output(model, task):
    assert guess_task(model, [1, 3, 8, 8]) == (task, [])


def test_the_output_that_fits_is_chosen_among_several():
    class Several(nn.Module):
        def forward(self, x):
            return {"small": x[:, :, ::2, ::2], "out": x, "state": None}

    assert guess_task(Several(), [1, 3, 8, 8]) == ("denoise", ["out"])


def test_an_output_of_no_task_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return (None, 3)

    with pytest.raises(ModelError, match="returns no tensor"):
        guess_task(Nothing(), [1, 3, 8, 8])
    with pytest.raises(ModelError, match=r"returns \[\[192\]\]"):
        guess_task(nn.Flatten(0), [1, 3, 8, 8])
    assert torch.is_grad_enabled()
