"""What every command of the command line prints with: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgedyn.files import to_json

if TYPE_CHECKING:
    from edgedyn.report.rows import Row

OUT = Console(highlight=False, markup=False)  # file names hold brackets
ERR = Console(highlight=False, markup=False, stderr=True)
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]


def print_json(value: object) -> None:
    """Print a result for programs."""
    sys.stdout.write(to_json(value))


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar a task on stderr, and nothing where stderr is no terminal."""
    bars = Progress(
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=ERR,
    )
    tasks: dict[str, Any] = {}

    def advance(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    if not ERR.is_terminal:
        yield lambda what, done, total: None
        return
    with bars:
        yield advance


def print_rows(rows: list[Row]) -> None:
    """Print one line a row; the longest fits 80 columns."""
    signs = {"at_most": "<=", "at_least": ">="}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("between", "metric", "value", "limit", "of", ""):
        table.add_column(column, overflow="fold", justify="right" if column in ("value", "of") else "left")
    for row in rows:
        limit = " ".join(f"{signs[key]} {value:.4g}" for key, value in row.limit.items())
        word = "FAILED" if not row.passed else "passed" if row.limit else "reported"
        table.add_row(row.between, row.metric, f"{row.value:.4g}", limit, str(row.samples), word)
    OUT.print(table)


def exit_unless(ok: bool) -> None:
    """Leave with exit code 1 where a check failed."""
    if not ok:
        raise typer.Exit(1)
