"""Printing of every command: results on stdout, progress, warnings and errors on stderr.

    result   stdout, always           the verdict, names of written files
    detail   stdout, unless --quiet   tables, measurements
    warn     stderr, always

Prose breaks between words only, so that a name can be copied whole; into a pipe it does not break at all.
Control characters in names are shown escaped.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgedyn.errors import printable
from edgedyn.files import to_json
from edgedyn.targets.quiet import quiet_libraries


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let BrokenPipeError pass; rich would leave with exit code 1, that of a failed check."""
        raise BrokenPipeError


OUT = _Console(highlight=False, markup=False)  # file names hold brackets
ERR = _Console(highlight=False, markup=False, stderr=True)
LOG = logging.getLogger("edgedyn.cli")  # its level is the verbosity
LOG.setLevel(logging.INFO)


def reopen_closed_streams() -> None:
    """Give the standard streams that the caller has closed, as with ``>&-``, an empty file.

    Python has None for them, and the next file that is opened takes their number.
    """
    # in this order: a new file takes the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def flush_streams() -> OSError | None:
    """Write out what is printed; return the error of standard output. Python then meets none at its end."""
    failure = None
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError as error:
            failure = error if stream is sys.stdout else None
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failure


def set_verbosity(verbose: bool | None) -> bool | None:
    """Set how much is printed: True verbose, False quiet; None changes nothing."""
    if verbose is not None:
        LOG.setLevel(logging.DEBUG if verbose else logging.WARNING)
    return verbose


def reset_verbosity() -> None:
    """Print details, and hide the output of libraries."""
    LOG.setLevel(logging.INFO)


def is_verbose() -> bool:
    """Return whether tracebacks and the output of libraries are shown."""
    return LOG.isEnabledFor(logging.DEBUG)


def result(text: str = "", *, style: str | None = None) -> None:
    """Print a line of the result; never broken, for it may be a path."""
    OUT.print(printable(text), soft_wrap=True, style=style)


def detail(text: str = "", *, style: str | None = None) -> None:
    """Print a line that --quiet leaves out; never broken, for it may hold a path."""
    if LOG.isEnabledFor(logging.INFO):
        OUT.print(printable(text), soft_wrap=True, style=style)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    ERR.print(f"warning: {printable(text)}", style="yellow", soft_wrap=True)


def print_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    sys.stdout.write(to_json(value))


def library_output() -> AbstractContextManager[None]:
    """Hide the output of torch, torchao, NNCF and ExecuTorch, unless --verbose."""
    return nullcontext() if is_verbose() else quiet_libraries()


def line_width() -> int | None:
    """Return the terminal's width in columns; None where stdout is no terminal and COLUMNS is not set."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return None
    return shutil.get_terminal_size().columns


def fold(text: str, *, width: int | None = None, indent: str = "") -> str:
    """Break lines between words so that they fit the terminal, or ``width`` columns.

    Args:
        text: one or more lines; a line that fits stays as it is.
        width: of a line; by default the terminal's.
        indent: in front of every line but the first.
    """
    width = line_width() if width is None else width
    if width is None:
        return text
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(line if len(line) <= width else wrapper.fill(line) for line in text.split("\n"))


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per phase on stderr; none with --quiet, or where stderr is no terminal."""
    bars = Progress(
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=ERR,
    )
    tasks: dict[str, Any] = {}

    def advance(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bars.add_task(printable(phase), total=total)
        bars.update(tasks[phase], completed=done, total=total)

    if not ERR.is_terminal or not LOG.isEnabledFor(logging.INFO):
        yield lambda phase, done, total: None
        return
    with bars:
        yield advance


def exit_unless(ok: bool) -> None:
    """Leave with exit code 1 where a check failed."""
    if not ok:
        raise typer.Exit(1)
