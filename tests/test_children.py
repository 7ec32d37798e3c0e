"""Python children import from where we do, never from the working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgedyn.children import import_path, python_command, run_tool

CANARY = "open({!r}, 'w').close()\n"
MODULE = """import json, sys
import edgedyn, helper
print(json.dumps([sys.path, sys.argv[1:], edgedyn.__file__]))
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A working directory full of modules that leave a file, and a folder of modules on our path."""
    here, ours = tmp_path / "here", tmp_path / "ours"
    here.mkdir()
    ours.mkdir()
    for name in ("json", "numpy", "edgedyn", "helper", "sitecustomize", "usercustomize", "runpy"):
        (here / f"{name}.py").write_text(CANARY.format(str(here / "ran")))
    (ours / "helper.py").touch()
    (ours / "asked.py").write_text(MODULE)
    monkeypatch.chdir(here)
    # an empty entry is the working directory: so Python itself would run the sitecustomize.py
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", "/elsewhere"))
    monkeypatch.setattr(sys, "path", ["", str(here), *sys.path, str(ours)])
    return here


def test_a_child_runs_nothing_of_the_working_directory(planted):
    done = run_tool(python_command("asked", "one", 2))
    assert done.returncode == 0, done.stderr
    path, arguments, ours = json.loads(done.stdout)
    assert arguments == ["one", "2"]
    assert path == import_path()
    assert not {"", str(planted)} & set(path)
    import edgedyn

    assert ours == edgedyn.__file__
    assert not (planted / "ran").exists()


def test_the_working_directory_stays_where_the_user_names_it(planted, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(planted)]))
    assert str(planted) in import_path()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/elsewhere"]))
    assert str(planted) not in import_path()
    import edgedyn

    monkeypatch.chdir(Path(edgedyn.__file__).parents[1])  # a checkout
    sys.path.insert(0, "")
    assert "" in import_path()


def test_a_deleted_working_directory_is_no_error(planted):
    for file in planted.iterdir():
        file.unlink()
    planted.rmdir()
    assert "" not in import_path()


def test_a_tool_that_takes_too_long_is_ended_and_odd_output_is_text():
    done = run_tool([sys.executable, "-c", "import sys; sys.stderr.buffer.write(b'a\\xff'); sys.exit(3)"])
    assert (done.returncode, done.stderr, done.stdout) == (3, "a\\xff", "")
    with pytest.raises(subprocess.TimeoutExpired):
        run_tool(["sleep", "60"], seconds=0.2)
