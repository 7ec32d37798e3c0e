"""What holds for every test: one thread, because small tensors cost more to share out than to compute."""

from __future__ import annotations

import os
import platform

import pytest

# Read when torch is first imported, and by the processes that tests start. On a busy machine two threads wait
# for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _shared_provenance():
    """As a build does: the tests export and lower as often."""
    from edgedyn.provenance import shared_provenance

    with shared_provenance():
        yield


@pytest.fixture(scope="session")
def arm64():
    """Compile the runner for ARM64, where there are the tools and the package."""
    from edgedyn.errors import TargetMissingError
    from edgedyn.targets.executorch import runner

    if platform.machine() != "x86_64":
        pytest.skip(f"compares ARM64 with x86_64, and this machine is {platform.machine()}")
    try:
        return runner.build(runner.ARM64)
    except TargetMissingError as error:
        pytest.skip(str(error))
