"""Settings of every test: one thread, because small tensors cost more to share out than to compute."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest

# Read when torch is first imported, and by the processes that tests start. On a busy machine two threads wait
# for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# readline exports the size of the terminal to the processes of pytest-xdist; tests of folding set their own
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def _shared_provenance():
    """As a build does: the tests export and lower as often."""
    from edgedyn.graph.provenance import shared_provenance

    with shared_provenance():
        yield


def _require_compiler(compiler: str, package: str) -> None:
    """Skip without a compiler that finds Highway; with one, sources that it refuses are a failure."""
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"there is no {compiler}: apt-get install {package}")
    source = '#include "hwy/highway.h"'
    read = [found, "-E", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(read, input=source, text=True, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} finds no Highway: apt-get install libhwy-dev")


@pytest.fixture(scope="session")
def library():
    """Compile our kernels for ExecuTorch and load them."""
    from edgedyn.targets.executorch import kernels

    _require_compiler("c++", "g++")
    return kernels.load()


@pytest.fixture(scope="session")
def arm64():
    """Compile the runner for ARM64, where there are the tools and the package."""
    from edgedyn.errors import TargetMissingError
    from edgedyn.targets.executorch import runner

    if platform.machine() != "x86_64":
        pytest.skip(f"compares ARM64 with x86_64, and this machine is {platform.machine()}")
    _require_compiler("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("there is no emulator: apt-get install qemu-user-static")
    try:
        runner.arm64_package()
    except TargetMissingError as error:
        pytest.skip(str(error))
    return runner.build(runner.ARM64)
