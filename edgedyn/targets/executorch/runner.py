"""Run a ``.pte`` by the C++ runner, without Python's binding: on this machine, or on an emulated ARM64 one.

The emulator translates ARM64 instructions: its results are a phone's, its times are not.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from packaging.version import Version

from edgedyn.bundle.manifest import FORWARD
from edgedyn.cache import cache, private_folder
from edgedyn.children import python_command, run_tool
from edgedyn.errors import BundleError, TargetMissingError
from edgedyn.targets import native
from edgedyn.targets.executorch import kernels

if TYPE_CHECKING:
    from edgedyn.targets import Run

SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One run of one method of a program."""

    path: Path
    program: str
    inputs: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Machine:
    """A machine that the runner is compiled for and started on.

    Attributes:
        name: for people.
        package: returns the folder ``executorch`` of the machine's package.
        options: options of CMake, to compile for the machine.
        start: command of an emulator, in front of the runner's.
        fix: sentence on the packages that building and starting the runner need.
    """

    name: str
    package: Callable[[], Path]
    options: tuple[str, ...]
    start: tuple[str, ...]
    fix: str


def arm64_package() -> Path:
    """Return the folder ``executorch`` of the ARM64 package of the installed version; download it once.

    Raises:
        TargetMissingError: where pip cannot download it, with pip's message.
    """
    release = Version(version("executorch")).public
    folder = cache() / f"executorch-{release}-aarch64"
    if folder.is_dir():
        return folder / "executorch"
    with tempfile.TemporaryDirectory(dir=private_folder(cache())) as download:
        choice = ("--platform", "manylinux_2_28_aarch64", "--only-binary=:all:", "--no-deps")
        options = ("download", "--quiet", *choice, "--dest", download)
        done = run_tool(python_command("pip", *options, f"executorch=={release}"))
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no word")
            raise TargetMissingError(
                f"the ARM64 package of ExecuTorch {release} cannot be downloaded: {last}. Expected a package "
                "index that pip reaches; try again with one."
            )
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            wheel.extractall(Path(download) / "unpacked")
        (Path(download) / "unpacked").rename(folder)  # atomic
    return folder / "executorch"


HERE = Machine("this machine", kernels.installed_package, (), (), "It needs what the fused kernels need.")
ARM64 = Machine(
    "ARM64",
    arm64_package,
    (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    ),
    # a phone's processor: NEON, half precision and dot products, but no SVE
    ("qemu-aarch64-static", "-cpu", "cortex-a76", "-L", "/usr/aarch64-linux-gnu"),
    "It needs an ARM64 compiler, an emulator, CMake 3.28 or newer and Highway: sudo apt-get install "
    'g++-aarch64-linux-gnu qemu-user-static libhwy-dev, pip install "edgedyn[kernels]".',
)


def build(machine: Machine) -> Path:
    """Return the path of the runner for a machine, with our kernels; compile it first where a source changed.

    Raises:
        TargetMissingError: without a tool that building or starting the runner needs.
    """
    if machine.start and shutil.which(machine.start[0]) is None:
        raise TargetMissingError(f"nothing here runs {machine.name}: no {machine.start[0]}. {machine.fix}")
    return native.CompiledFile(
        title=f"the runner for {machine.name}",
        project=SOURCES,
        file="edgedyn_runner",
        sources=(SOURCES / "runner.cpp", SOURCES / "CMakeLists.txt", *kernels.sources()),
        fix=machine.fix,
        options=(*kernels.linked(machine.package()), *machine.options),
        facts=(version("executorch"),),
    ).build()


def run_all(jobs: Sequence[Job], machine: Machine = ARM64) -> list[list[np.ndarray]]:
    """Run jobs one after the other in one process and return the outputs per job.

    Raises:
        TargetMissingError: as ``build``.
        BundleError: when a program cannot be loaded or run, with the runner's message.
    """
    runner = build(machine)
    with tempfile.TemporaryDirectory() as folder:
        arguments: list[str] = []
        for k, job in enumerate(jobs):
            place = Path(folder) / str(k)
            place.mkdir()
            for i, array in enumerate(job.inputs):
                np.save(place / f"input_{i}.npy", np.ascontiguousarray(array))
            arguments += [str(job.path), job.program, str(place)]
        done = run_tool([*machine.start, runner, *arguments])
        if done.returncode:
            message = " ".join(done.stderr.split("\n")[-4:]).strip() or f"exit status {done.returncode}"
            raise BundleError(
                f"ExecuTorch on {machine.name} cannot run a program: {message}. Expected a program and "
                "inputs for this machine; build the program again, `edgedyn doctor` prints the versions."
            )
        return [_outputs(Path(folder) / str(k)) for k in range(len(jobs))]


def _outputs(folder: Path) -> list[np.ndarray]:
    return [np.load(folder / f"output_{k}.npy") for k in range(len(list(folder.glob("output_*.npy"))))]


def load(path: Path, program: str = FORWARD, machine: Machine = ARM64) -> Run:
    """Return ``run(*arrays) -> [arrays]`` of a method of a ``.pte``; every run starts a process."""
    return lambda *arrays: run_all([Job(path, program, arrays)], machine)[0]
