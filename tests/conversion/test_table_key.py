"""A recipe's calibration table: made once, reused to the bit, shared by both targets, else refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import yaml
from small_blocks import Block, folded
from torch import nn
from typer.testing import CliRunner

from edgedyn import pipeline, quantize
from edgedyn.cli.app import app
from edgedyn.conversion import table_key as recipe_table
from edgedyn.conversion.convert import Converted, load_target
from edgedyn.errors import CalibrationError, RecipeError, UsageError
from edgedyn.images.image_set import CalibrationSet
from edgedyn.quantize import fold
from edgedyn.quantize.table.table import read_table
from edgedyn.recipe.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SMALL = ["model.network=small_networks:small_mallenet", "model.weights=null", "model.arguments={}"]
SMALL += ["input.shape=[1, 3, 32, 48]", "tile.overlap=0", "quantize.keep_float=[]", "quantize.dynamic=[]"]
SMALL += ["quantize.generated=tensor"]  # so that every convolution is INT8


def recipe(folder: Path, *overrides: str, target: str = "phone") -> Recipe:
    table = f"quantize.table={folder / 'table.json'}"
    return load_recipe(RECIPES / f"mallenet-s.{target}.int8.yaml", [*SMALL, table, *overrides])


def convert(given: Recipe, *, force: bool = False) -> Converted:
    calibration, samples = pipeline.load_sets(given)
    target = load_target(given)
    network = pipeline.rewrite_network(given, target)
    return pipeline.convert(network, target, calibration, samples[0], force=force)


def bits(made: Converted) -> tuple[str, list[bytes]]:
    program = made.parts["forward"].program
    return program.graph_module.code, [
        t.numpy().tobytes()
        for t in (*(t.detach() for t in program.state_dict.values()), *program.constants.values())
    ]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, Converted]:
    folder = tmp_path_factory.mktemp("first")
    return folder, convert(recipe(folder))


@pytest.fixture
def no_statistics(monkeypatch):
    """Let nothing be observed."""
    monkeypatch.setattr(quantize, "calibrate", lambda *_, **__: pytest.fail("observed samples"))


def test_second_conversion_observes_nothing_and_is_the_same_to_the_bit(first, no_statistics):
    folder, made = first
    again = convert(recipe(folder))
    assert bits(again) == bits(made)
    assert made.mismatch == again.mismatch == ""


def test_calibrating_again_gives_the_same_table(first, tmp_path):
    folder, _ = first
    convert(recipe(tmp_path))
    for name in ("table.json", "table.json.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_table_of_the_phone_serves_the_jetson(first, no_statistics):
    folder, _ = first
    made = convert(recipe(folder, target="jetson"))
    program = made.parts["forward"].program
    steps = [n.args[1:3] for n in program.graph.nodes if ".quantize_per_tensor" in str(n.target)]
    # affine ones: the recipe shifts maps, so that their zero points are gone
    known = {np.float32(entry.affine[0]) for entry in made.table.programs["forward"] if entry.affine}
    assert steps
    assert {zero_point for _, zero_point in steps} == {0}
    assert {np.float32(scale) for scale, _ in steps} <= known


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.seed=5", "of another model: weights was 'seed 0', now 'seed 5'"),
        ("calibration={}", "of another data"),
        ("input.shape=[1, 3, 48, 32]", "of another graph|of another transform: shapes"),
        ("input.range=[0, 255]", "of another transform: values"),
        ("quantize.ranges.feature=mse", "of another method: ranges was .*'minmax'.*, now .*'mse'"),
        ("quantize.keep_float=['3']", "of another method: keep_float"),
    ],
)
def test_table_of_something_else_is_refused_by_its_field_unless_forced(first, override, words):
    folder, _ = first
    override = override.replace("{}", str(RECIPES.parent / "calib/skimage-clean.yaml"))
    with pytest.raises(CalibrationError, match=words) as caught:
        convert(recipe(folder, override))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.Tanh(), nn.Sigmoid()),  # no weight and no shape differs
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)),
    ],
)
def test_graph_of_another_computation_is_another(one, other):
    conv, x = nn.Conv2d(3, 4, 1), torch.rand(1, 3, 8, 8)
    digests = [
        recipe_table._graph(fold(torch.export.export(nn.Sequential(conv, between), (x,))))
        for between in (one, one, other)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("tool", ["edgedyn", "torch", "torchao", "numpy"])
def test_table_of_other_tools_is_refused(first, tool, monkeypatch):
    folder, _ = first
    versions = {name: version(name) for name in recipe_table._TOOLS} | {tool: "99.0"}
    monkeypatch.setattr(recipe_table, "version", versions.__getitem__)
    with pytest.raises(CalibrationError, match=f"of other versions: {tool} was .*, now '99.0'"):
        convert(recipe(folder))


def test_nncf_counts_only_where_it_corrects_biases(tmp_path):
    assert "nncf" not in recipe_table.tools(recipe(tmp_path))
    corrected = recipe(tmp_path, "quantize.rounding=nearest", "quantize.bias_correction=fast")
    assert recipe_table.tools(corrected)[-1] == "nncf"


def test_forced_table_is_used_and_recorded(first, no_statistics):
    folder, _ = first
    made = convert(recipe(folder, "quantize.ranges.feature=mse"), force=True)
    assert "is of another method" in made.mismatch


@pytest.mark.parametrize("dynamic", ["[]", "['*']"])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("make_net", r"layer 'head' has a weight of \(8, 3, 3, 3\), and the calibration table has none"),
        ("wide_convolutions", r"layer '0' has a weight of \(12, .* has one of 8 output channels"),
        ("pointwise_mallenet", r"layer '0' has a weight of \(8, 3, 1, 1\), .* has one of \(8, 3, 3, 3\)"),
    ],
)
def test_table_of_other_layers_cannot_be_forced(first, network, words, dynamic):
    folder, _ = first
    given = recipe(folder, f"model.network=small_networks:{network}", f"quantize.dynamic={dynamic}")
    with pytest.raises(CalibrationError, match=words):
        convert(given, force=True)


@pytest.mark.parametrize("network", ["wide_convolutions", "pointwise_mallenet"])
def test_weights_of_another_network_are_not_given_to_float_layers_either(first, network):
    folder, _ = first
    given = recipe(folder, f"model.network=small_networks:{network}", "quantize.keep_float=['*']")
    with pytest.raises(CalibrationError, match=r"layer '0' has a weight of .* has one of"):
        convert(given, force=True)


def test_command_says_that_a_table_was_forced_and_that_nothing_was_trained(first, tmp_path):
    folder, _ = first
    values = [*SMALL, f"quantize.table={folder / 'table.json'}", "quantize.ranges.feature=mse"]
    options = [word for value in values for word in ("--set", value)]
    command = ["build", str(RECIPES / "mallenet-s.phone.int8.yaml"), *options, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--force", "--no-compare"])
    assert done.exit_code == 0, done.output
    assert "warning: by --force: the calibration table is of another method: ranges was" in done.stderr
    assert "Calibrate again" not in done.stderr
    assert "no trained weights; picture and decisions are reported without limits" in done.stdout


def test_place_that_can_hold_no_table_is_refused_before_an_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(CalibrationSet, "draw", lambda *_: pytest.fail("images were read"))
    with pytest.raises(UsageError, match="there is no folder"):
        pipeline.calibrate(recipe(tmp_path), tmp_path / "none/table.json")


def test_table_of_a_recipe_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        convert(recipe(tmp_path / "none"))


TRAINED = ("quantize.rounding=nearest", "quantize.finetune=30")  # of coarse weights: 30 steps are enough


@pytest.mark.parametrize("more", [TRAINED, (*TRAINED[:1], "quantize.bn_reestimation=true")])
def test_what_follows_rounding_is_in_the_table_to_the_bit(tmp_path, more, request):
    made = convert(recipe(tmp_path, *more))
    codes = {name for name, x in made.table.constants.items() if x.dtype == np.int8}
    assert codes == {f"forward/{e.name}" for e in made.table.programs["forward"] if e.kind == "weight"}
    request.getfixturevalue("no_statistics")
    assert bits(convert(recipe(tmp_path, *more))) == bits(made)


def test_fine_tuning_sees_other_crops_of_the_calibration_images(tmp_path, monkeypatch):
    seen = []

    def look(program, inputs, *_, **__):
        seen.append(inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "calibrate", look)
    with pytest.raises(KeyboardInterrupt):
        convert(recipe(tmp_path, *TRAINED))
    (inputs,) = seen
    assert len(inputs.finetuning) == len(inputs.samples) == 7
    assert inputs.sources == inputs.sources[:7] * 2
    assert not any(torch.equal(a, b) for (a,), (b,) in zip(inputs.samples, inputs.finetuning, strict=True))


def images_of(folder: Path, *names: str) -> str:
    """Put photos that scikit-image installs into a folder, which a recipe then fine-tunes on."""
    folder.mkdir()
    for name in names:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    return f"quantize.finetune_images={folder}"


def test_images_to_fine_tune_on_belong_to_the_table_and_their_path_does_not(tmp_path, request):
    given = images_of(tmp_path / "photos", "camera.png", "brick.png")
    made = convert(recipe(tmp_path, *TRAINED, given))
    assert [file["name"] for file in made.table.images["finetuning"]["files"]] == ["brick.png", "camera.png"]
    assert made.table.images["name"] == "skimage"
    request.getfixturevalue("no_statistics")
    moved = images_of(tmp_path / "moved", "camera.png", "brick.png")
    assert bits(convert(recipe(tmp_path, *TRAINED, moved))) == bits(made)
    with pytest.raises(CalibrationError, match="of another finetuning"):
        convert(recipe(tmp_path, *TRAINED))


def test_images_to_fine_tune_on_may_not_be_validated_on(tmp_path):
    validation = RECIPES.parent / "calib/skimage-validation.yaml"
    name = yaml.safe_load(validation.read_text())["files"][0]["name"]
    given = images_of(tmp_path / "photos", "camera.png", name)
    with pytest.raises(CalibrationError, match=rf"'photos' and validation set .* share 1 files.*{name}"):
        convert(recipe(tmp_path, *TRAINED, given))
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("seed", [0, 2], ids=["calibration", "fine-tuning"])
def test_sample_that_is_not_finite_is_named(tmp_path, monkeypatch, seed):
    draw = CalibrationSet.draw

    def spoilt(self, *arguments):
        for number, sample in enumerate(draw(self, *arguments)):
            if number == 2 and self.name == "skimage" and self.seed == seed:
                sample.inputs[0][0, 0, 3, 4] = np.nan
            yield sample

    monkeypatch.setattr(CalibrationSet, "draw", spoilt)
    with pytest.raises(CalibrationError, match=r"sample 2, retina\.jpg: 1 values are NaN or infinite"):
        convert(recipe(tmp_path, *TRAINED))
    assert list(tmp_path.iterdir()) == []


def test_table_holds_every_class_and_its_constants(first):
    folder, _ = first
    table = read_table(folder / "table.json")
    kinds = {entry.kind for entry in table.programs["forward"]}
    assert kinds == {"feature", "weight", "kernel"}
    codes = [x for x in table.constants.values() if x.dtype == np.int8]
    assert codes
    assert all(np.abs(x).max() <= 127 for x in codes)
    assert torch.tensor([x.size for x in codes]).sum() > 1000


def test_command_writes_the_table_that_a_conversion_writes(first, tmp_path, monkeypatch):
    folder, _ = first
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}{os.pathsep}{ROOT}")
    sets = [word for override in SMALL for word in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "edgedyn.cli.app",
        "calibrate",
        str(RECIPES / "mallenet-s.phone.int8.yaml"),
    ]
    command += ["-o", str(tmp_path / "table.json"), "--json", *sets]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    printed = json.loads(done.stdout)
    assert printed["images"]["name"] == "skimage"
    assert printed["tensors"].keys() == {"feature", "weight", "kernel"}
    for name in ("table.json", "table.json.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "table.json exists" in again.stderr.replace("\n", " ")


STOPPED = """
import os, signal, sys
from pathlib import Path
from edgedyn.cli import app as cli

{hook}
sys.argv = ["edgedyn", *sys.argv[1:]]
cli.main()
"""
# of the two renames of a table the second never happens; its weights stand there already
KILL = """
replace = Path.replace
def die(self, to):
    if to.suffix == ".json":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, to)
Path.replace = die
"""
INTERRUPT = """
from edgedyn import quantize
def interrupt(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
quantize.calibrate = interrupt
"""


def stop(folder: Path, monkeypatch, hook: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that stops itself on the way, as a power cut or Ctrl-C does."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}{os.pathsep}{ROOT}")
    sets = [word for override in SMALL for word in ("--set", override)]
    line = [sys.executable, "-c", STOPPED.format(hook=hook), *command, *sets]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, check=False)


def test_killed_calibration_leaves_no_table_and_the_next_run_starts_clean(first, tmp_path, monkeypatch):
    folder, made = first
    command = ["calibrate", str(RECIPES / "mallenet-s.phone.int8.yaml"), "-o", "table.json"]
    # what stands there is of something else: with its weights replaced it must not be taken for a table
    for name in ("table.json", "table.json.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:-1])
    killed = stop(tmp_path, monkeypatch, KILL, *command, "--force")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "table.json").exists()
    weights = (tmp_path / "table.json.safetensors").read_bytes()
    assert weights == (folder / "table.json.safetensors").read_bytes()
    (tmp_path / "table.json.safetensors").write_bytes(weights[:-1])
    assert bits(convert(recipe(tmp_path))) == bits(made)
    for name in ("table.json", "table.json.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("verb", ["calibrate", "build"])
def test_interrupted_command_says_so_and_leaves_nothing(tmp_path, monkeypatch, verb):
    table = ["--set", f"quantize.table={tmp_path / 'table.json'}"]
    command = [verb, str(RECIPES / "mallenet-s.phone.int8.yaml"), "-o", str(tmp_path / "out.json"), *table]
    stopped = stop(tmp_path, monkeypatch, INTERRUPT, *command)
    assert stopped.returncode == 130
    assert stopped.stderr.strip().startswith("Interrupted. No partial file was left.")
    assert "Traceback" not in stopped.stderr
    assert stopped.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_float_recipe_has_nothing_to_calibrate(tmp_path):
    given = load_recipe(RECIPES / "mallenet-s.phone.fp32.yaml", SMALL[:-1])
    with pytest.raises(RecipeError, match="has precision 'fp32'; only int8 has a calibration table"):
        pipeline.calibrate(given, tmp_path / "table.json")


def test_the_key_names_the_blocks_of_a_kernel_where_there_are_any(tmp_path):
    given = recipe(tmp_path)
    images, _ = pipeline.load_sets(given)

    def key(network: nn.Module, *, fuses_blocks: bool) -> dict[str, object]:
        module = folded(network)
        programs = {"forward": module}, {"forward": ({}, module)}
        return recipe_table.table_key(given, images, *programs, fuses_blocks=fuses_blocks)

    stock, fused = (key(Block(), fuses_blocks=fuses) for fuses in (False, True))
    assert fused == {**stock, "forms": {"inverted_residual": "fused"}}
    plain = nn.Conv2d(4, 4, 1)
    assert key(plain, fuses_blocks=True) == key(plain, fuses_blocks=False)
