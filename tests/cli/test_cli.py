"""The command line as a user meets it: real processes, exit codes, stdout and stderr."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedyn.cli.tables import print_rows
from edgedyn.report.rows import Row

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/mallenet-s.phone.fp32.yaml"


def edgedyn(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgedyn", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "bundle"
    done = edgedyn(
        "build",
        RECIPE,
        "-o",
        out,
        "--set",
        "input.shape=[1, 3, 64, 64]",
        "--set",
        "tile.overlap=32",
        "--no-compare",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    return out


def test_check_passes_and_fails_after_a_flip(bundle):
    done = edgedyn("check", bundle, "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)
    file = bundle / "report.html"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"?")
    done = edgedyn("check", bundle)
    file.write_bytes(data)
    assert done.returncode == 1
    assert "report.html" in done.stderr


def test_run_writes_a_photo_of_the_same_size(bundle, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    done = edgedyn("run", bundle, tmp_path / "photo.png", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out/photo.png").size == (130, 90)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "other.webp").write_bytes((tmp_path / "photo.png").read_bytes())
    again = edgedyn("run", bundle, tmp_path / "*.*[gp]", "-o", tmp_path / "out", "--json")
    assert again.returncode == 1
    assert "1 of 3 was there already; --force writes it again." in again.stderr
    assert "1 of 3 images failed:\n  image" in again.stderr
    told = json.loads(again.stdout)
    assert told["ok"] is False
    assert [image["state"] for image in told["images"]] == ["failed", "written", "there already"]
    assert told["images"][0]["error"]["type"] == "ImageError"
    assert Image.open(tmp_path / "out/other.webp").size == (130, 90)
    alone = edgedyn("run", bundle, tmp_path / "bad.png", "-o", tmp_path / "out")
    assert (alone.returncode, alone.stdout) == (2, "")


def test_run_is_a_filter_from_standard_input_to_standard_output(bundle):
    stream = io.BytesIO()
    Image.new("RGB", (70, 66), "gray").save(stream, "PNG")
    command = [sys.executable, "-m", "edgedyn", "run", str(bundle), "-", "-o", "-"]
    done = subprocess.run(command, input=stream.getvalue(), capture_output=True, timeout=600, check=True)
    assert Image.open(io.BytesIO(done.stdout)).size == (70, 66)


def test_compile_of_a_phone_bundle_is_refused(bundle):
    done = edgedyn("compile", bundle)
    assert done.returncode == 2
    assert "only tensorrt bundles are compiled" in done.stderr


def test_build_refuses_to_overwrite(bundle):
    done = edgedyn("build", RECIPE, "-o", bundle)
    assert done.returncode == 2
    assert "exists already" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "nowhere.yaml", "-o", "x"], 2, "does not exist"),
        (["build", RECIPE, "-o", "x", "--set", "quantise.engine=nncf"], 2, "did you mean 'quantize'"),
        (["build", RECIPE, "-o", "x", "--set", "precision=int7"], 2, "precision"),
        (["build", RECIPE, "-o", "x", "--set", "tile.overlap=256"], 2, "leaves nothing of a tile"),
        (["build", RECIPE, "-o", "x", "--set", "target=coreml"], 2, "executorch, onnxruntime, tensorrt"),
        (["build", RECIPE, "-o", "x", "--set", "validation=tests"], 5, "holds no image"),
        (["check", "docs"], 1, "manifest.json"),
        (["run", "docs", "README.md", "-o", "x"], 1, "manifest.json"),
        (["list", "layer"], 2, "layers"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_refusals_have_their_exit_code_and_say_what_to_do(arguments, code, message):
    done = edgedyn(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    "kind", ["layers", "authors", "ops", "targets", "networks", "metrics", "recipes", "keys"]
)
def test_list_prints_rows(kind):
    rows = json.loads(edgedyn("list", kind, "--json").stdout)
    assert rows
    assert all(isinstance(row, dict) for row in rows)


def test_inspect_names_each_dynamic_layer():
    small = ("--set", "input.shape=[1, 3, 64, 64]", "--set", "tile.overlap=16")
    done = edgedyn("inspect", "recipes/mallenet-s.jetson.int8.yaml", *small, "--json")
    found = json.loads(done.stdout)
    assert [layer["path"] for layer in found["layers"]] == [f"levels.{k}.2" for k in (3, 2, 1, 0)]
    for layer in found["layers"]:
        assert {name: form["form"] for name, form in layer["forms"].items()} == {
            "executorch": "banded_shift_mac",
            "onnxruntime": "resize_shift_mac",
            "tensorrt": "resize_shift_mac",
        }
    assert {tuple(layer["generated"]["grid"][2:]) for layer in found["layers"]} == {(2, 2)}
    # the finest level: 5 values sliced and 2 multiply-adds per pixel and channel
    assert found["layers"][-1]["apply_macs"] == 64 * 64 * 16 * (2 * 4 + 1)
    assert 0.2 < found["generator_share"] < 0.6


def test_doctor_says_how_to_get_what_is_missing():
    done = edgedyn("doctor")
    words = " ".join(done.stdout.split())
    if find_spec("pycuda") is None:
        assert "edgedyn[jetson]" in words.replace(" ", "")
    assert not re.search(r"^ *ok +pycuda +running", done.stdout, re.MULTILINE)


def test_network_of_a_module_in_the_working_directory_is_found(tmp_path):
    code = """from edgedyn.layers.malleconv import AffineMalleConv

def make():
    return AffineMalleConv(3, 4, 2)
"""
    (tmp_path / "mynet.py").write_text(code)
    script = Path(sys.executable).with_name("edgedyn")  # it has no working directory on its path by itself
    overrides = [
        "model.network=mynet:make",
        "model.arguments={}",
        "model.weights=null",
        "input.shape=[1,3,64,64]",
    ]
    options = [word for value in overrides for word in ("--set", value)]
    for command in (
        [script, "inspect", ROOT / RECIPE, *options, "--json"],
        [script, "inspect", "mynet:make", "--shape", "1,3,64,64", "--json"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        (layer,) = json.loads(done.stdout)["layers"]
        assert layer["class"] == "AffineMalleConv"


def test_file_names_with_brackets_are_printed_whole(bundle, tmp_path):
    Image.new("RGB", (70, 66), "gray").save(tmp_path / "IMG[final].png")
    done = edgedyn("run", bundle, tmp_path / "IMG[final].png", "-o", tmp_path / "out")
    assert done.stdout.strip() == str(tmp_path / "out/IMG[final].png")


def test_doctor_finds_what_is_installed():
    done = edgedyn("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"]["ok"]
    assert done.returncode == 0


def test_rows_fit_80_columns(bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = edgedyn("check", bundle)
    assert done.returncode == 0
    assert "max_abs[vectors/first.input.npy]" in done.stdout  # neither folded nor taken for markup
    assert done.stdout.count("passed") == 5
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_row_says_whether_it_was_judged(capsys):
    limits = ({}, {"at_most": 2.0}, {"at_most": 0.5})
    print_rows([Row("a:b", f"m{k}", 1.0, limit, 1) for k, limit in enumerate(limits)])
    words = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert words[-3:] == ["reported", "passed", "FAILED"]


def test_report_writes_the_same_page_again_and_keeps_its_pictures(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    page = (copy / "report.html").read_bytes()
    assert b"data:image/png" in page
    done = edgedyn("report", copy, "--json")
    assert (done.returncode, json.loads(done.stdout)["pictures"]) == (0, True), done.stderr
    assert (copy / "report.html").read_bytes() == page


def test_report_of_a_lost_page_has_the_numbers_and_no_pictures(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "report.html").unlink()
    done = edgedyn("report", copy)
    assert (done.returncode, done.stdout.strip()) == (0, str(copy / "report.html"))
    assert "has no pictures" in done.stderr
    page = (copy / "report.html").read_text()
    assert "data:image/png" not in page
    for row in json.loads((copy / "report.json").read_text())["rows"]:
        assert row["metric"].partition("[")[0] in page
    assert edgedyn("check", copy, "--quiet").stdout.startswith("ok: ")


def test_report_does_not_vouch_for_another_damaged_file(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "report.json").write_text("{}")
    done = edgedyn("report", copy)
    assert done.returncode == 1
    assert "report.json" in done.stderr


def test_schema_is_the_one_of_recipes():
    from edgedyn.recipe.describe import recipe_schema

    assert json.loads(edgedyn("schema").stdout) == recipe_schema()
