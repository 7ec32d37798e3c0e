"""The process in which ``edgedyn bench`` runs a bundle, so that its peak memory includes no other work.

Device side: numpy and the target's runtime.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgedyn.bench.speed import time_runs
from edgedyn.bundle.arrays import read_array
from edgedyn.bundle.dispatch import Dispatcher
from edgedyn.device import session
from edgedyn.targets.quiet import quiet_libraries


def run_bundle(path: Path, runs: int) -> dict[str, Any]:
    """Load and run a bundle's programs; return the values of ``benchmark.measure``."""
    with quiet_libraries():
        opened = session.open_session(path)
        pairs = zip(opened.bundle.vectors[0].inputs, opened.bundle.inputs, strict=True)
        arrays = [read_array(path, name, spec) for name, spec in pairs]
        loaded = status_bytes("VmRSS")
        assert isinstance(opened.run, Dispatcher)
        routing = opened.run.routing
        names = routing.variants if routing else tuple(opened.bundle.programs)
        megapixels = np.prod(arrays[0].shape[-2:]) / 1e6
        programs = {}
        for index, name in enumerate(names):
            variant = functools.partial(opened.run.run, forced=index if routing else None)
            times = time_runs(variant, arrays, runs=runs)
            programs[name] = {
                "latency_ms": times,
                "megapixels_per_second": float(megapixels / times["median"] * 1e3),
            }
    peak = status_bytes("VmHWM")
    memory = None if loaded is None or peak is None else {"peak": peak, "running": max(0, peak - loaded)}
    return {"programs": programs, "memory_bytes": memory, "runtime": session.runtime_name(opened.bundle)}


def status_bytes(key: str) -> int | None:
    """Return a memory figure of this process, ``VmRSS`` or ``VmHWM``, in bytes; None outside Linux.

    The peak of ``resource.getrusage`` is no alternative: it includes the parent's.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


if __name__ == "__main__":
    print(json.dumps(run_bundle(Path(sys.argv[1]), int(sys.argv[2]))))
