"""Compare every kernel with its oracle at random shapes, options and values, for a chosen time.

    python tools/fuzz_ops.py [--seconds 300] [--seed 0] [--op NAME] [--out FILE.json]
    python tools/fuzz_ops.py --op NAME --seed 0 --only 1234        repeat one call, in each way

A round draws 40 calls of each op, half of them INT8, and runs them on every instruction set that this
machine has, in 1 and 3 threads, under the address and undefined-behaviour sanitizers, and every fourth round
under the thread sanitizer. With an ``--out`` that exists, it continues the earlier count.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import measurement
import torch
import typer
from drivers import (
    DriverStoppedError,
    Job,
    Result,
    build_kernel_driver,
    instruction_sets,
    run_kernels,
    run_sanitized,
)
from op_calls import OpCall
from random_calls import DRAWS, describe, random_call

ROUND = 40
Runner = Callable[[Sequence[Job]], list[Result]]


def main(
    seconds: float = 300,
    seed: int = 0,
    op: Annotated[str | None, typer.Option(help="this op only")] = None,
    only: Annotated[int | None, typer.Option(help="the number of one call")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
) -> None:
    torch.set_num_threads(1)  # the calls are small
    names = [op] if op else list(DRAWS)
    if only is not None:
        sys.exit(show(random_call(names[0], seed, only)))
    record = resume(out, seed, names)
    end, first = time.monotonic() + seconds, record["rounds"]
    while time.monotonic() < end or record["rounds"] == first:
        for name in names:
            try_round(name, seed, record)
        record["rounds"] += 1
        measurement.write(out, record)
    print(json.dumps(record, indent=1))
    sys.exit(1 if record["failures"] else 0)


def resume(out: Path | None, seed: int, names: list[str]) -> dict[str, Any]:
    """Return the record of an earlier run, or an empty one."""
    empty = {
        "seed": seed,
        "rounds": 0,
        "calls": dict.fromkeys(names, 0),
        "runs": {},
        "failures": [],
    }
    if out is None or not out.exists():
        return empty
    earlier = {key: value for key, value in json.loads(out.read_text()).items() if key in empty}
    if (earlier["seed"], list(earlier["calls"])) != (seed, names):
        raise typer.BadParameter(f"{out} counts seed {earlier['seed']} of {list(earlier['calls'])}")
    return earlier


def runners(with_threads: bool) -> dict[str, Runner]:
    """Return every way to run a call by its name."""
    ways: dict[str, Runner] = {}
    for target in instruction_sets(build_kernel_driver()):
        for threads in (1, 3):
            ways[f"{target}, threads {threads}"] = lambda jobs, t=target, n=threads: run_kernels(
                jobs, target=t, threads=n
            )
    for sanitize in ("address,undefined", *(["thread"] if with_threads else [])):
        ways[f"sanitizer {sanitize}"] = lambda jobs, s=sanitize: run_sanitized(jobs, s, threads=3)
    return ways


def try_round(name: str, seed: int, record: dict[str, Any]) -> None:
    """Run one round of an op's calls in every way, and count."""
    first = record["rounds"] * ROUND
    calls = [random_call(name, seed, first + k) for k in range(ROUND)]
    for way, run in runners(with_threads=record["rounds"] % 4 == 0).items():
        for k, words in failures(calls, run):
            again = f"python tools/fuzz_ops.py --op {name} --seed {seed} --only {first + k}"
            record["failures"].append(
                {"again": again, "where": way, "call": describe(calls[k]), "found": words}
            )
        record["runs"][way] = record["runs"].get(way, 0) + len(calls)
    record["calls"][name] += len(calls)


def failures(calls: Sequence[OpCall], run: Runner) -> list[tuple[int, str]]:
    """Return (index, fault) of every wrong call; after a call that ends the process the others run again."""
    jobs, found, begin = [call.kernel_job() for call in calls], [], 0
    while begin < len(jobs):
        try:
            results = run(jobs[begin:])
        except DriverStoppedError as stopped:
            found.append((begin + stopped.index, stopped.words))
            results = run(jobs[begin : begin + stopped.index]) if stopped.index else []
        wrong = [call.discrepancy(result) for call, result in zip(calls[begin:], results, strict=False)]
        found += [(begin + k, words) for k, words in enumerate(wrong) if words]
        begin += len(results) + 1
    return found


def show(call: OpCall) -> int:
    """Print the finding of every way to run one call; return the number of faults."""
    print(describe(call), call.int8 or "")
    results = {way: failures([call], run) for way, run in runners(with_threads=True).items()}
    for way, found in results.items():
        print(f"{way}: {found[0][1] if found else 'right'}")
    return sum(bool(found) for found in results.values())


if __name__ == "__main__":
    typer.run(main)
