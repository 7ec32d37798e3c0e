"""Files are whole or as they were."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgedyn.errors import UsageError
from edgedyn.files import replace_file, replace_files, to_json


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.engine"
    replace_file(path, b"first")
    with pytest.raises(TypeError):
        replace_file(path, object())
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"


def test_replacing_a_file_that_cannot_be_written_is_refused_and_leaves_no_part(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        replace_file(tmp_path / "folder", b"data")
    assert os.listdir(tmp_path) == ["folder"]


def test_files_that_belong_together_are_refused_before_anything_changes(tmp_path):
    first, last = tmp_path / "a", tmp_path / "z"
    replace_files({first: b"1", last: b"1"})
    with pytest.raises(TypeError):
        replace_files({first: b"2", last: object()})
    with pytest.raises(UsageError, match=r"cannot write .*nowhere/z"):
        replace_files({first: b"2", tmp_path / "nowhere/z": b"2"})
    assert (first.read_bytes(), last.read_bytes()) == (b"1", b"1")
    assert sorted(os.listdir(tmp_path)) == ["a", "z"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edgedyn.files import replace_files

left = int(sys.argv[2])

def dying(method):
    def call(self, *arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(self, *arguments, **options)
    return call

Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
replace_files({Path(sys.argv[1], name): b"new" for name in ("a", "b", "z")})
"""


@pytest.mark.parametrize("steps", range(5))
def test_killed_writer_leaves_the_last_file_with_its_own_others_or_not_at_all(tmp_path, steps):
    """Killed before any step that shows: one removal and three renames; after them nothing is left to do."""
    names = ("a", "b", "z")
    replace_files({tmp_path / name: b"old" for name in names})
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(steps)], check=False)
    assert killed.returncode == -signal.SIGKILL
    found = {name: (tmp_path / name).read_bytes() for name in names if (tmp_path / name).exists()}
    expected = {0: dict.fromkeys(names, b"old"), 4: dict.fromkeys(names, b"new")}
    assert found == expected.get(steps, found)
    assert ("z" in found) == (steps in expected)


def test_json_holds_nothing_that_a_strict_parser_refuses():
    values = {"rows": [{"value": math.inf}, (math.nan, -math.inf)], "path": Path("out"), "median": 1.5}
    text = to_json(values)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"rows": [{"value": "inf"}, ["nan", "-inf"]], "path": "out", "median": 1.5}
