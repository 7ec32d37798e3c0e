"""Measure time and peak memory of ``edgedyn calibrate``, for each kind of rounding, in a process of its own.

    python tools/bench_calibrate.py recipes/mallenet-s.phone.int8.yaml --images PATH
                                    [--out docs/measurements/calibration-time.json]

Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import measurement
import typer


def main(
    recipe: Path,
    images: Annotated[Path, typer.Option(help="folder of calibration images")],
    samples: int = 32,
    height: int = 320,
    width: int = 480,
    plain: Annotated[
        bool, typer.Option("--plain", help="also time with the C library's own handling of freed memory")
    ] = False,
    out: Path | None = None,
) -> None:
    settings = {"calibration": images, "input.shape": [1, 3, height, width], "quantize.samples": samples}
    runs = [("nearest", True), *([("nearest", False)] if plain else []), ("reconstruct", True)]
    subject = (
        f"{recipe.stem}, {samples} images of {height} x {width}: seconds of the whole command, peak memory"
    )
    rows = []
    for rounding, keeps in runs:
        found = calibrate(recipe, settings | {"quantize.rounding": rounding}, keeps)
        rows.append({"rounding": rounding, "keeps_memory": keeps, **found})
        print(json.dumps(rows[-1]), flush=True)
        measurement.write(out, {"what": subject, "rows": rows})


def calibrate(recipe: Path, settings: dict[str, object], keeps: bool) -> dict[str, float]:
    """Run the command and return its wall and processor seconds, peak memory in MiB and page faults."""
    program = ["from edgedyn.cli import app as cli", "cli.main()"]
    if not keeps:
        program.insert(1, "cli.keep_freed_memory = lambda: None")
    with tempfile.TemporaryDirectory() as folder:
        command = ["-c", "; ".join(program), "calibrate", str(recipe), "-o", f"{folder}/table.json"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        start = time.perf_counter()
        process = os.posix_spawn(sys.executable, [sys.executable, *command], os.environ)
        _, status, used = os.wait4(process, 0)
        seconds = time.perf_counter() - start
    if status:
        raise typer.Exit(1)
    return {
        "seconds": round(seconds, 1),
        "user_s": round(used.ru_utime, 1),
        "system_s": round(used.ru_stime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),  # Linux counts in KiB
        "page_faults": used.ru_minflt,
    }


if __name__ == "__main__":
    typer.run(main)
