"""A layer, an op with forms, a network and a target from a user's folder: files, and nothing edited."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from edgedyn import extensions
from edgedyn.errors import UsageError

ROOT = Path(__file__).parents[1]
RECIPE = """
name: blur
model: {{network: blur_net, arguments: {{channels: 6}}}}
input: {{shape: [1, 3, 32, 48]}}
tile: {{overlap: 8}}
target: {target}
precision: {precision}
quantize: {{samples: 2}}
calibration: {calib}/skimage.yaml
validation: {calib}/skimage-validation.yaml
limits: {{drop_db: 40, sqnr_db: 5}}
"""


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return shutil.copytree(Path(__file__).parent / "extension", tmp_path_factory.mktemp("user") / "mine")


def edgedyn(*arguments: object, folders: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgedyn.cli.app", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), extensions.VARIABLE: folders},
    )


def build(extension: Path, tmp_path: Path, target: str, precision: str) -> dict:
    recipe = tmp_path / "blur.yaml"
    recipe.write_text(RECIPE.format(target=target, precision=precision, calib=ROOT / "calib"))
    done = edgedyn("build", recipe, "-o", tmp_path / "out", "--json", folders=str(extension), cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def operators(bundle: str) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(Path(bundle, "model.onnx")).graph.node}


def test_network_of_the_extension_is_built_to_int8_and_its_bundle_checked(extension, tmp_path):
    built = build(extension, tmp_path, "onnxruntime", "int8")
    assert built["ok"]
    assert built["forms"] == {"gated_mean2d": "box_filter"}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(built["bundle"])
    done = edgedyn("check", tmp_path / "out", "--json", folders=str(extension))
    assert json.loads(done.stdout)["ok"]


def test_target_of_the_extension_is_built_for_and_takes_the_form_that_it_can_run(extension, tmp_path):
    built = build(extension, tmp_path, "pooling", "fp32")
    assert built["ok"]
    assert built["forms"] == {"gated_mean2d": "average_pool"}
    assert "AveragePool" in operators(built["bundle"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("layers", "gated_blur"), ("ops", "gated_mean2d"), ("networks", "blur_net"), ("targets", "pooling")],
)
def test_list_names_what_an_extension_adds(extension, kind, name):
    rows = json.loads(edgedyn("list", kind, "--json", folders=str(extension)).stdout)
    assert name in {row[kind.removesuffix("s")] for row in rows}


CONFORMANCE = """
import torch
from edgedyn import layers, ops, targets
known, layer = ops.load_all(), layers.load_all()["gated_blur"]
for name, form_name in (("gated_mean2d", "average_pool"), ("masked_conv2d", "select_active")):
    op = known[name]
    assert op.forms[0].name == form_name
    assert ops.choose_form(op, targets.load("pooling")).name == form_name
    assert ops.choose_form(op, targets.load("onnxruntime")).name != form_name
    for case in op.examples():
        args = [x.double() if isinstance(x, torch.Tensor) else x for x in case]
        for form in op.forms:
            y = (form.fn or op.overload)(*args)
            torch.testing.assert_close(y, op.overload(*args), rtol=1e-12, atol=1e-12)
for module, inputs in layer.examples():
    module, inputs = module.double(), [x.double() for x in inputs]
    canonical = layers.canonicalize(module)
    assert type(canonical).__name__ == "CanonicalGatedBlur"
    torch.testing.assert_close(canonical(*inputs), module(*inputs), rtol=1e-12, atol=1e-12)
print(len(known["gated_mean2d"].forms))
"""


def test_forms_and_the_canonical_layer_of_the_extension_are_exact(extension):
    env = {**os.environ, "PYTHONPATH": str(ROOT), extensions.VARIABLE: str(extension)}
    done = subprocess.run(
        [sys.executable, "-c", CONFORMANCE], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "2", done.stderr


@pytest.mark.parametrize("named", ["nothing_here", "mine/layers"])
def test_folder_without_any_room_is_refused(extension, named):
    done = edgedyn("list", "layers", folders=str(extension.parent / named))
    assert done.returncode == UsageError.exit_code
    assert "Traceback" not in done.stderr
    assert "which has none of the folders layers, models, ops, targets" in " ".join(done.stderr.split())


def test_a_bundle_or_the_working_directory_adds_nothing(extension):
    rows = json.loads(edgedyn("list", "layers", "--json", folders="", cwd=extension).stdout)
    assert rows
    assert "gated_blur" not in {row["layer"] for row in rows}


def test_folders_are_joined_as_in_path_and_only_existing_rooms_count(tmp_path, monkeypatch):
    (tmp_path / "a/layers").mkdir(parents=True)
    (tmp_path / "b/ops/deep").mkdir(parents=True)
    for file in ("a/layers/x.py", "b/ops/deep/y.py", "a/stray.py"):
        (tmp_path / file).write_text("")
    monkeypatch.setenv(extensions.VARIABLE, os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    assert extensions.folders() == [tmp_path / "a", tmp_path / "b"]
    assert extensions.files() == [tmp_path / "a/layers/x.py", tmp_path / "b/ops/deep/y.py"]
    assert extensions.extend_path(["own"], "edgedyn.ops") == [
        "own",
        str(tmp_path / "a/ops"),
        str(tmp_path / "b/ops"),
    ]


def test_hidden_modules_and_files_beside_folders_are_no_entries(tmp_path):
    for file in ("_private.py", "paper.py", "op/__init__.py", "_hidden/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    assert extensions.module_names([str(tmp_path)]) == ["op", "paper"]
    assert extensions.module_names([str(tmp_path)], are_folders=True) == ["op"]


@pytest.mark.parametrize("name", ["paper.py", "_adopt.py"])
def test_name_that_exists_already_is_refused(tmp_path, name):
    for folder in ("ours", "mine"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("")
    with pytest.raises(UsageError, match=r"mine/\w+ has the name of .*ours/.*Rename it"):
        extensions.module_names([str(tmp_path / "ours"), str(tmp_path / "mine")])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", r"incomplete\.py has no constant ITEM; expected one"),
        ("ITEM = 3", r"ITEM of incomplete is int 3; expected PurePosixPath 'incomplete'"),
        (
            "from pathlib import PurePosixPath; ITEM = PurePosixPath('other')",
            r"is PurePosixPath 'other'; expected PurePosixPath 'incomplete'",
        ),
    ],
)
def test_file_without_its_constant_is_refused(tmp_path, monkeypatch, source, says):
    (tmp_path / "incomplete.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(UsageError, match=says):
            extensions.load_named("incomplete", "ITEM", PurePosixPath)
    finally:
        sys.modules.pop("incomplete", None)


@pytest.mark.parametrize(
    ("file", "source", "says"),
    [
        ("forms.py", "", r"has the name of .*edgedyn/ops/masked_conv2d/forms; expected a name of its own"),
        ("mine.py", "", r"mine\.py has no constant FORM; expected one"),
        ("mine.py", "FORM = 3", r"FORM of edgedyn\.ops\.masked_conv2d\.mine is int 3; expected Form 'mine'"),
    ],
)
def test_wrong_file_of_a_form_is_refused(tmp_path, file, source, says):
    (tmp_path / "ops/masked_conv2d").mkdir(parents=True)
    (tmp_path / "ops/masked_conv2d" / file).write_text(source)
    done = edgedyn("list", "ops", folders=str(tmp_path))
    assert done.returncode == UsageError.exit_code
    assert "Traceback" not in done.stderr
    assert re.search(says, " ".join(done.stderr.split())), done.stderr
