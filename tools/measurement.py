"""Provenance of the numbers in docs/measurements/: machine, versions and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "executorch", "torchao", "nncf", "onnxruntime", "numpy")


def provenance(packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """Return machine, versions and command of this process; paths outside the project lose their folders."""
    arguments = [_shorten(word) for word in sys.argv[1:]]
    return {
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} CPUs",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "command": shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *arguments]),
    }


def _shorten(word: str) -> str:
    """Drop the folders of a path, or of KEY=PATH, that exist on this machine only."""
    key, equals, value = word.rpartition("=")
    path = Path(value)
    return key + equals + path.name if path.is_absolute() or ".." in path.parts else word


def pin(threads: int) -> str:
    """Keep this process, and those that it starts, on its first CPUs; return their numbers in words.

    Called before a pool of threads is made. Where the system cannot pin, nothing happens.
    """
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned"
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    return f"pinned to CPUs {', '.join(map(str, cpus))}"


def write(path: Path | None, record: dict[str, Any]) -> None:
    """Write a measurement with its provenance as JSON; a path of None writes nothing."""
    if path is not None:
        path.write_text(json.dumps({**record, **provenance()}, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    """Return the processor's name, on Linux from /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
