"""Standard streams that are closed, full or without a reader: the exit code is right, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_bundles import onnx_model, write_small

COMMAND = f"{sys.executable} -m edgedyn"


def start(line: str, folder: Path) -> tuple[int, str]:
    """Run a line of bash; return the exit code of its first command, and what it wrote."""
    line = line.replace("edgedyn", COMMAND, 1) + "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("edgedyn schema >&-", 0),
        ("edgedyn schema <&- >&- 2>&-", 0),
        ("edgedyn schema >/dev/full", 2),
        ("edgedyn schema | true", 141),
        ("edgedyn list layers | true", 141),
        ("edgedyn check missing >&- 2>&-", 1),
        ("edgedyn check missing --json >/dev/full", 1),
        ("edgedyn check missing 2>/dev/full", 1),
        ("edgedyn check missing 2>&1 | true", 1),
        ("edgedyn inspect missing.yaml 2>&1 | true", 2),
        ("edgedyn nothing 2>/dev/full", 2),
        ("edgedyn run bundle - -o out <&-", 2),
    ],
)
def test_streams_that_take_nothing(line: str, code: int, tmp_path: Path):
    if "run" in line:
        write_small(tmp_path / "bundle", onnx_model())
    found, text = start(line, tmp_path)
    assert found == code
    assert "Traceback" not in text
    assert text.count("error ") == (1 if code in (1, 2) and "2>" not in line else 0)


def test_a_closed_stdout_is_no_file_of_the_command(tmp_path: Path):
    """The first file that is opened would get the number of stdout, and be written into."""
    write_small(tmp_path / "bundle", onnx_model())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert start("edgedyn check bundle >&-", tmp_path) == (0, "")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
