"""The command line in this process: versions, verbosity, errors as JSON, completion, help at 80 columns."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgedyn.cli import app as command_line
from edgedyn.cli.lists import LISTS
from edgedyn.cli.terminal import LOG, is_verbose
from edgedyn.errors import CalibrationError

ROOT = Path(__file__).parents[2]
WIDE = 80


@pytest.fixture(autouse=True)
def normal_verbosity():
    yield
    LOG.setLevel(logging.INFO)


def execute(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run one command in this process; return its exit code, stdout and stderr."""
    try:
        code = command_line.execute(list(arguments))
    except SystemExit as leaving:  # completion leaves by itself
        code = int(leaving.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_version_prints_one_line_each(capsys):
    code, out, _ = execute(capsys, "--version")
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    assert code == 0
    assert list(lines) == ["edgedyn", "torch", "executorch", "onnxruntime", "python"]
    assert lines["torch"] == importlib.metadata.version("torch")
    assert lines["python"] == sys.version.split()[0]


def test_version_of_a_missing_package_says_so(capsys, monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    _, out, _ = execute(capsys, "--version")
    assert "torch not installed" in out


def test_module_runs_as_the_command_does():
    command = [sys.executable, "-m", "edgedyn", "list", "layer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "did you mean 'layers'?" in done.stderr


def test_help_lists_every_exit_code_and_verb(capsys):
    code, out, _ = execute(capsys, "--help")
    assert code == 0
    for number in (0, 1, 2, 3, 4, 5, 130):
        assert any(line.split()[:1] == [str(number)] for line in out.splitlines()), number
    for verb in ("build", "init", "inspect", "calibrate", "compile", "check", "run", "bench", "report"):
        assert f"\n  {verb} " in out
    assert "5    the calibration images are refused" in out


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "words"),
    [
        (["check", "nowhere", "--json"], "BundleError", 1, "no directory"),
        (["list", "recipe", "--json"], "UsageError", 2, "did you mean 'recipes'?"),
        (["build", "nowhere.yaml", "-o", "x", "--json"], "RecipeError", 2, "does not exist"),
        (["build", "--json"], "UsageError", 2, "RECIPE"),
        (["no-such-verb", "--json"], "UsageError", 2, "no-such-verb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_json_on_stdout_and_words_on_stderr(capsys, arguments, kind, code, words):
    found, out, err = execute(capsys, *arguments)
    assert found == code
    value = json.loads(out)
    assert value["ok"] is False
    assert value["error"]["type"] == kind
    assert value["error"]["exit_code"] == code
    assert words in value["error"]["message"]
    assert words in err
    without, out, _ = execute(capsys, *[word for word in arguments if word != "--json"])
    assert (without, out) == (code, "")


def test_doctor_prints_one_json_value_though_something_is_missing(capsys, monkeypatch):
    from edgedyn.cli import doctor

    missing = [doctor.Finding("torch", None, "everything", False, "pip install torch", False)]
    monkeypatch.setattr(doctor, "examine", lambda: missing)
    code, out, err = execute(capsys, "doctor", "--json")
    assert code == 3
    assert json.loads(out)["ok"] is False
    assert "missing, or of a wrong version: torch" in err
    code, out, err = execute(capsys, "doctor")
    assert code == 3
    assert "fix: pip install torch" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["calibrate", "--make-manifest", "", "-o", "set.json"],
            "3 is empty, after '--make-manifest'",
        ),
        (["calibrate", "--make-manifest=", "-o", "set.json"], "--make-manifest has an empty value"),
        (["run", "bundle", ""], "argument 3 is empty, after 'bundle'"),
        (["check", ""], "argument 2 is empty, after 'check'"),
        ([""], "argument 1 is empty; expected"),
    ],
)
def test_an_empty_argument_is_not_the_working_directory(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = execute(capsys, *arguments)
    assert code == 2
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_an_option_may_set_a_key_to_nothing(capsys):
    code, _, err = execute(capsys, "build", "no-such-recipe", "-o", "out", "--set=model.weights=")
    assert code == 2
    assert "no-such-recipe" in err
    assert "empty" not in err


def test_an_interruption_says_that_nothing_is_half_written(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(LISTS, "layers", interrupted)
    code, out, err = execute(capsys, "list", "layers", "--json")
    assert code == 130
    assert "Interrupted. No partial file was left. Run the same command again; if its result" in err
    assert json.loads(out)["error"]["exit_code"] == 130


def test_quiet_leaves_the_result_and_verbose_adds_the_traceback(capsys, monkeypatch):
    def refuse() -> None:
        raise CalibrationError("too few images")

    monkeypatch.setitem(LISTS, "layers", refuse)
    for arguments in (["-v", "list", "layers"], ["list", "layers", "-v"]):
        code, _, err = execute(capsys, *arguments)
        assert code == 5
        assert "Traceback" in err
        assert "too few images" in err
    code, _, err = execute(capsys, "list", "layers")
    assert code == 5
    assert "Traceback" not in err  # the verbosity of one command is not the next one's
    assert "too few images" in err


@pytest.mark.parametrize(("flag", "level"), [("-v", logging.DEBUG), ("-q", logging.WARNING)])
def test_verbosity_is_read_before_and_after_the_verb(capsys, monkeypatch, flag, level):
    levels = []
    monkeypatch.setitem(LISTS, "ops", lambda: levels.append(LOG.level) or [])
    for arguments in ([flag, "list", "ops"], ["list", "ops", flag], ["list", "ops"]):
        assert execute(capsys, *arguments)[0] == 0
    assert levels == [level, level, logging.INFO]


def test_libraries_speak_only_where_asked():
    from edgedyn.cli.terminal import library_output, set_verbosity

    logger = logging.getLogger("torchao")
    before = logger.level
    try:
        set_verbosity(True)
        assert is_verbose()
        logger.setLevel(logging.INFO)
        with library_output():
            assert logger.level == logging.INFO
        set_verbosity(False)
        with library_output():
            assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_each_shell_completes_verbs(shell, tmp_path):
    environment = {**os.environ, "_EDGEDYN_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-m", "edgedyn"]
    script = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "_EDGEDYN_COMPLETE" in script
    if shell == "fish":
        request = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": "edgedyn cal"}
    else:
        request = {"COMP_WORDS": "edgedyn cal", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "edgedyn cal"}
    environment = {**os.environ, "_EDGEDYN_COMPLETE": f"complete_{shell}", **request}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "calibrate" in done.stdout
    assert "doctor" not in done.stdout


def test_help_offers_completion():
    shown = CliRunner().invoke(command_line.app, ["--help"], env={"COLUMNS": "80"}).output
    assert "--install-completion" in shown
    assert "--show-completion" in shown


def test_show_completion_prints_a_script_of_the_shell_in_use():
    bash = f"{sys.executable} -m edgedyn --show-completion; true"  # true: bash stays the parent
    done = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "_edgedyn_completion" in done.stdout


@pytest.mark.parametrize("kind", ["layers", "ops", "networks", "recipes", "keys", "targets"])
def test_names_are_whole_at_80_columns_and_in_a_pipe(kind, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = json.loads(execute(capsys, "list", kind, "--json")[1])
    monkeypatch.setenv("COLUMNS", str(WIDE))
    narrow = execute(capsys, "list", kind)[1]
    monkeypatch.delenv("COLUMNS")
    piped = execute(capsys, "list", kind)[1].splitlines()
    assert len(piped) == 1 + len(rows)
    assert max(map(len, narrow.splitlines())) <= WIDE
    for row, line in zip(rows, piped[1:], strict=True):
        for cell in row.values():
            assert str(cell) in line
        first = str(next(iter(row.values())))
        assert first in [word for shown in narrow.splitlines() for word in shown.split()]
