"""Freed memory is used again: the system gives no new pages for each feature map."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BLOCKS, SIZE = 20, 40 * 2**20
COUNT = f"""
import resource, sys
from edgedyn.cli.memory import keep_freed_memory

assert sys.argv[1] == "as it is" or keep_freed_memory()
for _ in range({BLOCKS}):
    b'x' * {SIZE}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_blocks_take_the_memory_of_the_last_one():
    faulted = {}
    for how in ("as it is", "kept"):
        command = [sys.executable, "-c", COUNT, how]
        faulted[how] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faulted["kept"] < faulted["as it is"] - (BLOCKS - 2) * SIZE
