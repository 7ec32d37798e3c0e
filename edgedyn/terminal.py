"""What every command of the command line prints with: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgedyn.files import to_json

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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the chatter of torch, torchao, NNCF and ExecuTorch off the terminal; errors still show."""
    logging.basicConfig(level=logging.ERROR)
    for name in ("torchao", "nncf", "executorch", "torch", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch sets this one's level itself when it is imported
    logging.getLogger("torch.fx.experimental.symbolic_shapes").addFilter(
        lambda record: record.levelno >= logging.ERROR
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
