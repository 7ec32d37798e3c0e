"""Signals, full disks and odd names: a message, an exit code, and nothing left."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedyn.cli import app as command_line
from edgedyn.cli.lists import LISTS
from edgedyn.cli.signals import interruptible

ROOT = Path(__file__).parents[2]
BUILD = """
import sys, time
from pathlib import Path
from edgedyn.cli import app, lists
from edgedyn.files import replace_file, staging_folder

def work():
    out = Path(sys.argv[1])
    with staging_folder(out / "bundle") as staging:
        (staging / "model.pte").write_bytes(b"half")
        print("ready", flush=True)
        time.sleep(60)

lists.LISTS["layers"] = work
sys.exit(app.execute(["list", "layers"]))
"""


def start(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **pipes, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGTERM, "by SIGTERM"),
        (signal.SIGHUP, "by SIGHUP"),
        (signal.SIGINT, "Interrupted. No partial"),
    ],
)
def test_a_signal_ends_a_command_as_ctrl_c_does(tmp_path, number, words):
    work = start(BUILD, tmp_path)
    assert work.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 1
    work.send_signal(number)
    _, err = work.communicate(timeout=60)
    assert work.returncode == 128 + number
    assert words in err
    assert "Run the same command again; if its result exists by then, it is complete." in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_a_second_signal_does_not_break_the_clean_up():
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)

    with interruptible() as interruption, pytest.raises(KeyboardInterrupt):
        work()
    assert cleaned == [True]
    assert interruption.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_under_nohup_outlives_the_terminal(tmp_path):
    work = start(BUILD, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert work.stdout.readline() == "ready\n"
    work.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        work.wait(timeout=1)
    work.terminate()
    work.communicate(timeout=60)
    assert work.returncode == 128 + signal.SIGTERM


def test_remains_of_a_killed_command_are_swept_by_the_next_run_and_those_of_a_living_one_are_not(tmp_path):
    killed, living = start(BUILD, tmp_path), start(BUILD, tmp_path)
    assert [work.stdout.readline() for work in (killed, living)] == ["ready\n", "ready\n"]
    before = set(os.listdir(tmp_path))
    assert len(before) == 2
    killed.kill()
    killed.communicate(timeout=60)
    assert set(os.listdir(tmp_path)) == before
    again = start(BUILD, tmp_path)
    assert again.stdout.readline() == "ready\n"
    after = set(os.listdir(tmp_path))
    assert len(after) == 2
    assert len(after & before) == 1  # the folder of the living one
    for work in (living, again):
        work.terminate()
        work.communicate(timeout=60)
    assert os.listdir(tmp_path) == []


FULL = BUILD.replace('print("ready", flush=True)', "(staging / 'b').write_bytes(bytes(2**20))")


def test_a_full_disk_is_a_refusal_that_says_how_to_go_on(tmp_path):
    limit = (2**16, 2**16)
    work = start(FULL, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, err = work.communicate(timeout=60)
    assert work.returncode == 2
    assert "error UsageError: cannot write" in err
    assert "File too large. Free disk space, or choose a place on another disk." in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["list", "layers"], ["list", "layers", "--json"]])
def test_a_full_disk_behind_stdout_is_no_traceback(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "edgedyn", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


def test_a_reader_that_leaves_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgedyn", "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (1, 128 + signal.SIGPIPE)  # typer leaves with 1 where it notices first


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "\x1b[31mred"],
        ["build", "a\x1b]0;title\x07.yaml", "-o", "x"],
        ["no\x1b[2Jverb"],
        ["run", "nowhere", "--\x1b[1m"],
        ["inspect", "x\u202etxt.yaml"],
        ["check", "\udcff\x9b31m"],
    ],
    ids=ascii,
)
def test_terminal_escapes_in_names_are_shown_escaped(capsys, arguments):
    assert command_line.execute(arguments) in (1, 2)
    printed = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\udcff"} & set(printed.err + printed.out)
    assert "\\x1b" in printed.err or "\\u202e" in printed.err or "\\x9b" in printed.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "/tmp/x"), 2, "/tmp/x: No space left on device"),
        (MemoryError(), 70, "not enough memory"),
        (KeyError("x"), 70, "a fault of edgedyn. Report it"),
    ],
)
def test_an_error_that_nothing_expected_is_one_message(capsys, monkeypatch, error, code, words):
    def fail() -> None:
        raise error

    monkeypatch.setitem(LISTS, "layers", fail)
    assert command_line.execute(["list", "layers"]) == code
    assert words in capsys.readouterr().err
