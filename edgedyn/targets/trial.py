"""Run a lowered program once, in a process of its own: a runtime that aborts ends that process alone.

The process is kept for the next program, since the import of a runtime takes longer than a run of most
programs. Device side: the target's runtime only.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedyn.children import Child, ChildEndedError, limit_resources, serve
from edgedyn.errors import printable

TRIAL_SECONDS = 600.0  # of our own program on example inputs; the import and a build of our kernels count
_kept: dict[tuple[object, ...], Child] = {}


@dataclass(frozen=True)
class Refusal:
    """A runtime's refusal of a program.

    Attributes:
        words: the exception's text, or how the process ended.
        log: lines that the runtime wrote before, printable.
        has_ended: whether the process ended.
    """

    words: str
    log: tuple[str, ...]
    has_ended: bool


def find_refusal(target: str, path: Path, program: str, arrays: Sequence[np.ndarray]) -> Refusal | None:
    """Load a program and run it once in the kept process; return the refusal, or None.

    Args:
        target: whose ``run.attempt`` does it.
        path: the lowered file.
        program: the name in it.
        arrays: its inputs.
    """
    # whatever decides where the kernels of ours lie: the process reads it once
    key = (os.getpid(), target, os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))
    child = _kept.pop(key, None)
    if child is None:
        end_kept()
        child = Child(__name__, target)
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{index}.npy" for index in range(len(arrays))]
        for file, array in zip(files, arrays, strict=True):
            np.save(file, array)
        try:
            words, log = child.ask([str(path.absolute()), program, files], seconds=TRIAL_SECONDS)
        except ChildEndedError as error:
            return Refusal(f"the process that ran it {error.how}", _lines(error.log), has_ended=True)
    if words is None:
        _kept[key] = child
        return None
    child.close()  # a refusal may leave the runtime in any state
    return Refusal(printable(words), _lines(log), has_ended=False)


@atexit.register
def end_kept() -> None:
    """End the kept process."""
    while _kept:
        _kept.popitem()[1].close()


def _lines(log: str) -> tuple[str, ...]:
    lines = ("".join(c if c.isprintable() else "?" for c in line).strip() for line in log.splitlines())
    return tuple(line for line in lines if line)


def _answer(target: str, question: Any) -> str | None:
    path, program, files = question  # of the process that lowers; target is a name that it has loaded
    run = importlib.import_module(f"edgedyn.targets.{target}.run")
    try:
        run.attempt(Path(path), program, [np.load(file) for file in files])
    except Exception as error:  # the classes differ per runtime
        return str(error) or type(error).__name__
    return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)  # they belong to the parent

if __name__ == "__main__":
    limit_resources()
    serve(lambda question, _: _answer(sys.argv[1], question))
