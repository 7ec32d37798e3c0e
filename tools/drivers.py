"""The programs in tools/driver: build them, send them calls of ops, read their results.

They call a kernel directly: a thousand calls take one or two seconds, while lowering a single program takes a
third of a second.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgedyn.cache import build_cached, cached_path
from edgedyn.targets import native
from edgedyn.targets.executorch import kernels

SOURCES = Path(__file__).parent / "driver"
_LETTERS = {torch.float32: "f", torch.float64: "d", torch.float16: "e", torch.int8: "b"}


class Job(NamedTuple):
    """One call.

    Attributes:
        name: name of the kernel in ExecuTorch's registry, or of the op.
        values: its arguments; the last one is the output with its initial content.
        shift: offset of each tensor from a 64-byte line, bytes.
    """

    name: str
    values: tuple[Any, ...]
    shift: int = 0


class Result(NamedTuple):
    """Result of a call: y, or None after an error; ``message`` is the runtime's log."""

    y: np.ndarray | None
    message: str


class DriverStoppedError(Exception):
    """The program ended before its last job: by a crash, or by a sanitizer's finding."""

    def __init__(self, index: int, words: str) -> None:
        super().__init__(f"job {index} ended the process: {words}")
        self.index, self.words = index, words


def build_kernel_driver(sanitize: str = "") -> Path:
    """Return ``run_kernels``; with a sanitizer (``address,undefined`` or ``thread``) it contains the kernels.

    Raises:
        TargetMissingError: as for the kernels.
    """
    return _build("run_kernels", sanitize)


def build_program_runner() -> Path:
    """Return ``run_program``, which runs a ``.pte`` for ``count_instructions``.

    Raises:
        TargetMissingError: as for the kernels.
    """
    return _build("run_program", "")


def _build(name: str, sanitize: str) -> Path:
    library = kernels.library()
    made_of = (*_sources(), *(library.sources if sanitize else ()))
    options = (*library.options, f"-DSANITIZE={sanitize}")
    return replace(
        library, title=name, project=SOURCES, file=name, target=name, sources=made_of, options=options
    ).build()


def build_formula_driver(sanitize: str = "") -> Path:
    """Return ``run_formulas``, which needs a C++ compiler and nothing else.

    Raises:
        FileNotFoundError: without the compiler g++.
    """
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    program = cached_path("run_formulas", _sources(), *flags)

    def make(folder: Path) -> Path:
        sources = ["-I", native.SOURCES, SOURCES / "run_formulas.cpp", "-o", folder / program.name]
        subprocess.run(["g++", *flags, *sources], check=True)
        return folder / program.name

    return build_cached(program, make)


def _sources() -> tuple[Path, ...]:
    return (*sorted(SOURCES.iterdir()), *native.find_sources("*.h"))


def instruction_sets(program: Path) -> list[str]:
    """Return the instruction sets that ``run_kernels`` can choose here, best first."""
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()


def run_jobs(program: Path, jobs: Sequence[Job], *words: object) -> list[Result]:
    """Run all jobs in one process.

    Args:
        program: one that ``build_..._driver`` returned.
        jobs: the calls.
        words: further arguments: threads, instruction set, library.

    Raises:
        DriverStoppedError: with the job and the program's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls, outputs = Path(folder) / "jobs", Path(folder) / "results"
        with calls.open("wb") as file:
            for job in jobs:
                _write_job(file, job)
        command = [program, calls, outputs, *words]
        # no leak check: it traces the process, which containers often forbid
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, check=False, env=environment
        )
        results = _read_results(outputs, jobs) if outputs.exists() else []
    if done.returncode or len(results) != len(jobs):
        raise DriverStoppedError(len(results), f"exit {done.returncode}: {done.stderr[:4000]}")
    return results


def count_instructions(path: Path, inputs: Sequence[Tensor]) -> int | None:
    """Return the number of instructions of one run of a ``.pte`` on one thread, or None without valgrind.

    It counts the second run. Valgrind 3.19 knows no AVX-512: our kernels and XNNPACK's, which both choose by
    the processor, use AVX2.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job"
        with job.open("wb") as file:
            _write_job(file, Job("forward", tuple(inputs)))
        options = [
            "--tool=callgrind",
            "--toggle-collect=edgedyn_counted_run",
            "--callgrind-out-file=/dev/null",
        ]
        command = [valgrind, *options, build_program_runner(), path, job, kernels.build()]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return int(done.stderr.split("Collected : ")[1].split()[0])


def run_kernels(jobs: Sequence[Job], *, threads: int = 2, target: str = "best") -> list[Result]:
    """Run jobs through the library that ``edgedyn ops build`` makes."""
    return run_jobs(build_kernel_driver(), jobs, threads, target, kernels.build())


def run_sanitized(jobs: Sequence[Job], sanitize: str, *, threads: int = 2) -> list[Result]:
    """Run jobs through kernels that were compiled with a sanitizer."""
    return run_jobs(build_kernel_driver(sanitize), jobs, threads, "best")


def _write_job(file: BinaryIO, job: Job) -> None:
    _write_text(file, job.name.encode())
    file.write(struct.pack("q", len(job.values)))
    for value in job.values:
        if value is None:
            file.write(b"n")
        elif isinstance(value, bool):
            file.write(struct.pack("=cb", b"b", value))
        elif isinstance(value, int):
            file.write(struct.pack("=cq", b"i", value))
        elif isinstance(value, float):
            file.write(struct.pack("=cd", b"d", value))
        elif isinstance(value, str):
            file.write(b"s")
            _write_text(file, value.encode())
        else:
            _write_tensor(file, value, job.shift)


def _write_tensor(file: BinaryIO, tensor: Tensor, shift: int) -> None:
    file.write(b"t" + _LETTERS[tensor.dtype].encode())
    for numbers in (tensor.shape, tensor.stride()):
        file.write(struct.pack(f"{1 + len(numbers)}q", len(numbers), *numbers))
    file.write(struct.pack("q", shift))
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    _write_text(file, tensor.permute(order).contiguous().numpy().tobytes())


def _write_text(file: BinaryIO, text: bytes) -> None:
    file.write(struct.pack("q", len(text)) + text)


def _read_results(path: Path, jobs: Sequence[Job]) -> list[Result]:
    data, at, results = path.read_bytes(), 0, []

    def number() -> int:
        nonlocal at
        at += 8
        return int.from_bytes(data[at - 8 : at], "little", signed=True)

    def text() -> bytes:
        nonlocal at
        size = number()
        at += size
        return data[at - size : at]

    while at < len(data):
        status, message = number(), text().decode()
        sizes = [number() for _ in range(number())]
        element = np.int8 if jobs[len(results)].values[-1].dtype == torch.int8 else np.float32
        content = text()
        y = np.frombuffer(content, element).reshape(sizes) if status == 0 else None
        results.append(Result(y, message if status >= 0 else f"memory: {message}"))
    return results
