"""The command line: verb first, recipe or bundle first. Results on stdout, progress on stderr.

This file assembles the commands, one file each, and turns every refusal into a message and an exit code.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from contextlib import suppress
from typing import Annotated, Any

import typer

from edgedyn import errors
from edgedyn.children import leave_working_directory
from edgedyn.cli.bench import bench
from edgedyn.cli.build import build
from edgedyn.cli.calibrate import calibrate
from edgedyn.cli.check import check
from edgedyn.cli.compile import compile_engines
from edgedyn.cli.doctor import doctor
from edgedyn.cli.init import init
from edgedyn.cli.inspect import inspect
from edgedyn.cli.lists import list_things
from edgedyn.cli.memory import keep_freed_memory
from edgedyn.cli.native import ops, plugin
from edgedyn.cli.options import Verbosity
from edgedyn.cli.report import report
from edgedyn.cli.run import run
from edgedyn.cli.schema import schema
from edgedyn.cli.signals import interruptible
from edgedyn.cli.terminal import (
    ERR,
    flush_streams,
    is_verbose,
    print_json,
    reopen_closed_streams,
    reset_verbosity,
    result,
    set_verbosity,
)
from edgedyn.errors import EdgedynError, UsageError, printable

INTERRUPTED = 130
UNEXPECTED = 70
PIPE_CLOSED = 141  # 128 and SIGPIPE, as the shell counts
# true also where the signal came after the result had taken its place, which most commands do not replace
_AGAIN = "Run the same command again; if its result exists by then, it is complete."
_PACKAGES = ("edgedyn", "torch", "executorch", "onnxruntime")
_EXIT_CODES = (errors.__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]

app = typer.Typer(
    help="Deploy PyTorch networks with dynamic layers to phones (ExecuTorch) and Jetsons (TensorRT).",
    epilog=f"Exit codes:\n\n\b\n{_EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help are not markup, and its boxes split names
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(build)
app.command()(inspect)
app.command()(init)
app.command()(calibrate)
app.command(name="compile")(compile_engines)
app.command()(check)
app.command()(run)
app.command()(bench)
app.command()(report)
app.command()(doctor)
app.command(name="list")(list_things)
app.command()(schema)
app.add_typer(ops, name="ops")
app.add_typer(plugin, name="plugin")


def show_version(asked: bool) -> None:
    """Print one line per version, and leave."""
    if not asked:
        return
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        result(f"{package} {version}")
    result(f"python {platform.python_version()}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print versions and exit."),
    ] = False,
    verbose: Verbosity = None,
) -> None:
    """Read the options in front of the command."""
    reset_verbosity()
    set_verbosity(verbose)


def main() -> None:
    """Run the command line; every refusal becomes one message and its exit code."""
    reopen_closed_streams()
    keep_freed_memory()
    leave_working_directory()
    code = execute(sys.argv[1:])
    if error := flush_streams():
        code = code or _refuse_disk(error, as_json=False)
    sys.exit(code)


def execute(arguments: list[str]) -> int:
    """Run one command and return its exit code.

    With ``--json`` an error is printed on stdout too: {"ok": false, "error": {type, message, exit_code}}.
    """
    as_json = "--json" in arguments
    with interruptible() as interruption:
        try:
            _refuse_empty(arguments)
            code = app(arguments, prog_name="edgedyn", standalone_mode=False) or 0
        except EdgedynError as error:
            return _refuse(type(error).__name__, str(error), error.exit_code, as_json)
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except OSError as error:
            return _refuse_disk(error, as_json)
        except SystemExit as error:  # typer leaves with 1, a failed check, where nobody reads the output
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            return PIPE_CLOSED
        except Exception as error:
            if not hasattr(error, "format_message"):  # those of typer have it; their class is not public
                return _refuse(type(error).__name__, _unexpected(error), UNEXPECTED, as_json)
            usage: Any = error
            usage.message = printable(str(usage.message))
            with suppress(OSError):
                usage.show()
            return _fail("UsageError", printable(usage.format_message()), usage.exit_code, as_json)
    if code == INTERRUPTED:
        code = 128 + (interruption.number or signal.SIGINT)
        name = "" if code == INTERRUPTED else f" by {signal.Signals(interruption.number).name}"
        message = f"Interrupted{name}. No partial file was left. {_AGAIN}"
        with suppress(OSError):
            ERR.print(message, soft_wrap=True)
        return _fail("Interrupted", message, code, as_json)
    return int(code)


def _refuse_empty(arguments: list[str]) -> None:
    """Refuse empty arguments, as of an unset variable in a script: a path would be the working directory."""
    for at, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if not argument or (option.startswith("--") and option != argument and not value):
            place = f"argument {at + 1} is empty" if not argument else f"{option} has an empty value"
            after = f", after {arguments[at - 1]!r}" if at and not argument else ""
            raise UsageError(printable(f"{place}{after}; expected a value. Give one, or leave it out."))


def _refuse_disk(error: OSError, as_json: bool) -> int:
    """Return the exit code of a full disk or closed permissions; of a pipe without reader, say nothing."""
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    message = f"{name}{error.strerror or error}. Check the path, its permissions and the space on the disk."
    return _refuse("UsageError", printable(message), UsageError.exit_code, as_json)


def _unexpected(error: Exception) -> str:
    """Describe an error that no public function should raise."""
    if isinstance(error, MemoryError):
        return "there is not enough memory. Close other programs, or use smaller images or tiles."
    return printable(f"{error}. This is a fault of edgedyn. Report it with the traceback, which -v prints.")


def _refuse(kind: str, message: str, exit_code: int, as_json: bool) -> int:
    """Print an error, with its traceback where asked, and return its exit code."""
    with suppress(OSError):  # standard error may be closed or full
        if is_verbose():
            traceback.print_exc()
        ERR.print(f"error {kind}: ", style="bold red", end="")
        ERR.print(message, soft_wrap=True)
    return _fail(kind, message, exit_code, as_json)


def _fail(kind: str, message: str, exit_code: int, as_json: bool) -> int:
    """Return the exit code of an error; with ``--json``, print the error on stdout first."""
    if as_json:
        with suppress(OSError):  # stdout itself may be what cannot be written
            print_json({"ok": False, "error": {"type": kind, "message": message, "exit_code": exit_code}})
    return exit_code


if __name__ == "__main__":
    main()
