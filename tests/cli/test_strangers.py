"""Bundles, recipes and folders of somebody else run no code: every planted file would leave a canary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_bundles import onnx_model, write_small

from edgedyn.cli.app import execute

MODULES = (
    *("numpy", "pycuda", "tensorrt", "onnxruntime", "torch", "executorch", "yaml", "typer", "rich", "PIL"),
    *("sitecustomize", "usercustomize", "packaging", "edgedyn_plugins"),
)
RECIPE = """model: {{network: '{}', arguments: {}}}
input: {{shape: [1, 3, 64, 64]}}
target: onnxruntime
precision: fp32
validation: x
"""


@pytest.fixture
def here(tmp_path):
    """A folder in which every module that we might import is planted, and a bundle beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    write_small(tmp_path / "bundle", onnx_model())
    return folder


def edgedyn(*arguments: object, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-m", "edgedyn", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("command", [["check"], ["bench", "--runs", "1"]])
def test_commands_on_a_bundle_run_nothing_of_the_working_directory(here, tmp_path, command):
    done = edgedyn(*command, "../bundle", cwd=here, home=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not (here / "ran").exists()


def test_commands_inside_a_bundle_with_code_refuse_it_and_run_nothing(here, tmp_path):
    bundle = tmp_path / "bundle"
    (here / "numpy.py").rename(bundle / "numpy.py")
    done = edgedyn("bench", ".", cwd=bundle, home=tmp_path / "cache")
    assert done.returncode == 1
    assert "entry 'numpy.py'" in done.stderr
    assert not (here / "ran").exists()


@pytest.mark.parametrize("trust", [[], ["--trust"]])
@pytest.mark.parametrize("where", ["recipe", "bundle", "command"])
def test_a_dry_run_calls_no_function_that_makes_no_network(tmp_path, monkeypatch, capsys, where, trust):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.format("os:system", "{command: touch ran}")
    Path("r.yaml").write_text(text)
    if where == "bundle":
        write_small(tmp_path / "out", onnx_model())
    name = {"recipe": "r.yaml", "bundle": "out/recipe.yaml", "command": "os:getcwd"}[where]
    if where == "bundle":
        (tmp_path / "out/recipe.yaml").write_text(text)
    code = execute(["inspect", name, *trust])
    message = capsys.readouterr().err
    if trust:  # the user asked for it
        assert (code, "expected torch.nn.Module" in message) == (4, True)
        return
    assert code == 2
    assert "is not trusted" in message
    assert "--trust" in message
    assert not Path("ran").exists()
    recipe = Path(name if where != "command" else "r.yaml")
    (recipe.parent / "x").mkdir()
    (recipe.parent / "x" / "a.png").write_bytes(b"opened before the network, never decoded")
    assert execute(["build", str(recipe), "-o", "b"]) == 2
    assert not Path("ran").exists()
