"""Measure the memory of ``edgedyn run`` by the size of the photo: the largest resident set of its process.

    python tools/bench_memory.py BUNDLE [BUNDLE...] [--out docs/measurements/run-memory.json]

The photos are made of scikit-image's coffee with noise. The growth per megapixel compares the
largest with the smallest photo, so that runtime and libraries do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import measurement
import numpy as np
import skimage.data
import typer
from PIL import Image

MB = 1e6
RUN = """
from edgedyn.bench.process import status_bytes
from edgedyn.cli.app import main

try:
    main()
finally:
    print(status_bytes("VmHWM"))
"""


def main(
    bundles: list[Path],
    sizes: Annotated[str, typer.Option(help="comma-separated, width x height")] = "1155x866,8660x5774",
    suffixes: Annotated[str, typer.Option(help="comma-separated, of the photos")] = ".jpg,.png",
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
) -> None:
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix in suffixes.split(","):
            photos = [make_photo(folder, size, suffix) for size in sizes.split(",")]
            for bundle in bundles:
                peaks = {photo.stem: peak_bytes(bundle, photo, folder / "out") for photo in photos}
                results.append({"bundle": bundle.name, "format": suffix[1:], **summary(peaks)})
                print(json.dumps(results[-1]), flush=True)
                measurement.write(out, {"results": results})


def make_photo(folder: Path, size: str, suffix: str) -> Path:
    """Write a photo of a size; noise of up to 8 levels, so that it compresses as a photo does."""
    width, height = map(int, size.split("x"))
    pixels = np.asarray(Image.fromarray(skimage.data.coffee()).resize((width, height))).astype(np.int16)
    pixels += np.random.default_rng(0).integers(-8, 9, pixels.shape, dtype=np.int16)
    path = folder / f"{size}{suffix}"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        path, **({"quality": 95} if suffix == ".jpg" else {})
    )
    return path


def peak_bytes(bundle: Path, photo: Path, out: Path) -> int:
    """Return the largest resident set of ``edgedyn run``; ``ru_maxrss`` would include this process's own."""
    arguments = ["run", str(bundle), str(photo), "-o", str(out), "--force", "-q"]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise typer.BadParameter(f"edgedyn run {bundle} {photo.name} ended with {done.returncode}")
    return int(done.stdout.splitlines()[-1])


def summary(peaks: dict[str, int]) -> dict[str, object]:
    """Return the peaks in MB and their growth per megapixel."""
    pixels = {size: int(np.prod([int(side) for side in size.split("x")])) / MB for size in peaks}
    small, large = min(pixels, key=pixels.__getitem__), max(pixels, key=pixels.__getitem__)
    growth = (peaks[large] - peaks[small]) / MB / (pixels[large] - pixels[small])
    return {
        "peak_mb": {size: round(peak / MB, 1) for size, peak in peaks.items()},
        "mb_per_megapixel": round(growth, 2),
    }


if __name__ == "__main__":
    typer.run(main)
