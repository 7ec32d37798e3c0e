"""Damage files of strangers at random, and count how each reader takes it.

    python tools/fuzz_readers.py [TARGET ...] [--mutations 1000] [--seconds S] [--out FILE.json]
    python tools/fuzz_readers.py TARGET --only 1234             repeat one mutation, with its traceback

A mutation is ok, refused (an EdgedynError), or a fault: another exception, the end of the process, more than
``--limit`` seconds, more than 1 GB of memory, or a wrong ok (an altered bundle that passes its check with
other outputs). Mutations run in a child, which a fault may end; the next child goes on behind it. With an
``--out`` that exists, counting goes on where it ended: ``--mutations`` are those of all runs together.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import measurement
import typer

from edgedyn.errors import EdgedynError, printable
from edgedyn.targets.quiet import quiet_libraries

if TYPE_CHECKING:
    from reader_targets import Target

OUTCOMES = ("ok", "refused", "crashes", "exceptions", "hangs", "memory", "wrong_ok")
FAULTS = OUTCOMES[2:]
MAX_GROWTH_BYTES = 2**30
BATCH = 2000
_LOADING_S = 600.0  # a target may build a bundle first
_PACKAGES = ("torch", "executorch", "onnxruntime", "numpy", "pillow", "safetensors", "pyyaml", "pydantic")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="targets; all by default")] = None,
    mutations: int = 1000,
    seconds: Annotated[float, typer.Option(help="per target, at most")] = 1e9,
    limit: Annotated[float, typer.Option(help="seconds of one mutation, at most")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
    only: Annotated[int | None, typer.Option(help="the number of one mutation")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    from reader_targets import TARGETS

    if worker:
        work(worker, *map(int, (names or [])))
        return
    if only is not None:
        repeat((names or [""])[0], only)
        return
    record = json.loads(out.read_text()) if out is not None and out.exists() else {"targets": {}}
    for name in names or [name for name in TARGETS if not missing(name)]:
        row = record["targets"].setdefault(name, {"mutations": 0, **dict.fromkeys(OUTCOMES, 0), "faults": []})
        end = time.monotonic() + seconds
        while row["mutations"] < mutations and time.monotonic() < end:
            count = min(BATCH, mutations - row["mutations"])
            for outcome, words in run_batch(name, row["mutations"], count, limit, end):
                row[outcome] += 1
                if outcome in FAULTS:
                    row["faults"].append(
                        {"mutation": row["mutations"], "outcome": outcome, "found": words[-300:]}
                    )
                    row["faults"] = row["faults"][:20]
                row["mutations"] += 1
            if out is not None:
                out.write_text(json.dumps({**record, **measurement.provenance(_PACKAGES)}, indent=1) + "\n")
        print(name, {key: value for key, value in row.items() if key != "faults"}, flush=True)
    sys.exit(1 if any(row[fault] for row in record["targets"].values() for fault in FAULTS) else 0)


def missing(name: str) -> str:
    """Return the package that a target lacks here, or the empty string."""
    return "pillow-heif" if name == "heic" and find_spec("pillow_heif") is None else ""


def run_batch(name: str, first: int, count: int, limit: float, end: float) -> Iterator[tuple[str, str]]:
    """Yield (outcome, words) of each mutation of a batch; a child that a mutation ends is replaced."""
    done = 0
    while done < count and time.monotonic() < end:
        found = []
        with tempfile.NamedTemporaryFile() as errors:
            command = [sys.executable, __file__, "--worker", name, str(first + done), str(count - done)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child:
                for outcome, words in watch(child, limit, end):
                    found.append(outcome)
                    if outcome != "ready":
                        yield outcome, words
                        done += 1
            words = Path(errors.name).read_text(errors="replace").strip()[-400:]
        if not found and time.monotonic() < end:
            raise RuntimeError(f"target {name} cannot be loaded, or refuses whole files: {words}")
        if child.returncode and found[-1:] != ["hangs"] and done < count and time.monotonic() < end:
            yield "crashes", f"exit {child.returncode}: {words}"
            done += 1


def watch(child: subprocess.Popen[bytes], limit: float, end: float) -> Iterator[tuple[str, str]]:
    """Yield the outcomes that a child prints; one that prints nothing for too long is stopped."""
    assert child.stdout is not None
    text, is_ready, pipe = b"", False, child.stdout.fileno()
    while True:
        wait = min(limit if is_ready else _LOADING_S, max(end - time.monotonic(), 0))
        if not select.select([pipe], [], [], wait)[0]:
            child.kill()
            if time.monotonic() < end:
                yield "hangs", f"more than {limit} s"
            return
        chunk = os.read(pipe, 2**16)
        if not chunk:
            return
        *lines, text = (text + chunk).split(b"\n")
        for line in lines:
            outcome, _, words = line.decode().partition(" ")
            yield outcome, words  # the first says that the target is loaded
            is_ready = True


def work(name: str, first: int, count: int) -> None:
    """Run mutations of a target in this process, and print a line per outcome."""
    from reader_targets import TARGETS

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print, too
    with quiet_libraries(), tempfile.TemporaryDirectory() as cache:
        target = TARGETS[name]()
        os.environ["XDG_CACHE_HOME"] = cache  # a program that passed its trial is noted there
        for seed in target.seeds:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, target.name)
                path.write_bytes(seed)
                target.read(path)  # a target that refuses whole files finds nothing
        for line in chain(["ready"], outcomes(target, name, range(first, first + count))):
            lines.write(line.replace("\n", " ")[:1000] + "\n")
            lines.flush()  # the next mutation may end the process


def outcomes(target: Target, name: str, numbers: Iterable[int]) -> Iterator[str]:
    """Yield the outcome of each mutation, and for a fault its words."""
    for number in numbers:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, target.name)
            path.write_bytes(target.file(Random(f"{name}:{number}")))
            outcome = outcome_at(target, path)
        growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        yield f"memory {growth} bytes more" if growth > MAX_GROWTH_BYTES else outcome


def outcome_at(target: Target, path: Path) -> str:
    """Read one file, and return the outcome."""
    from reader_targets import WrongOkError

    try:
        target.read(path)
    except EdgedynError as error:
        shown = str(error).replace("\n", "").replace("\t", "")
        if shown != printable(shown) or len(shown) > 50_000:
            return f"exceptions a message that cannot be printed, {shown!a}"
        return "refused"
    except WrongOkError as error:
        return f"wrong_ok {error}"
    except Exception as error:  # the fault that is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"exceptions {type(error).__name__}: {error!a} at {place.filename}:{place.lineno}"
    return "ok"


def repeat(name: str, number: int) -> None:
    """Run one mutation here; an error of any kind is shown with its traceback."""
    from reader_targets import TARGETS

    target = TARGETS[name]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, target.name)
        path.write_bytes(target.file(Random(f"{name}:{number}")))
        print(path.read_bytes()[:2000])
        print("ok", target.read(path))


if __name__ == "__main__":
    typer.run(main)
