"""Measure the cost of tiling, by overlap: kernels predicted from a tile differ from those of the whole image.

    python tools/measure_seams.py [--tile 256] [--out docs/measurements/seams.json]

For each overlap: the PSNR lost against the whole image run at once, the difference in 8-bit grey levels, and
the step at tile borders: the mean jump of the difference from one column to the next at the borders, divided
by that elsewhere (1 is no seam). The trained mallenet-s, float32 in PyTorch, on photos that scikit-image
installs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import measurement
import numpy as np
import torch
import typer
from make_noisy import add_noise

from edgedyn.bundle.bundle import Bundle
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.device.session import Session
from edgedyn.device.tiling import tiles
from edgedyn.images import metrics
from edgedyn.images.image_set import open_set
from edgedyn.images.photo import read_image
from edgedyn.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def main(
    tile: int = 256,
    overlaps: Annotated[str, typer.Option(help="comma-separated, pixels")] = "0,16,32,64,96",
    sigma: float = 25.0,
    out: Path | None = None,
) -> None:
    recipe = load_recipe(ROOT / "recipes/mallenet-s.phone.fp32.yaml")
    model = recipe.load_model()

    def run(x: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [model(torch.from_numpy(x)).numpy()]

    photos = [read_image(path).pixels for path, _ in open_set(recipe.path(recipe.validation)).files]
    rows = []
    for overlap in map(int, overlaps.split(",")):
        spec = TensorSpec("image", "float32", (1, 3, tile, tile), "").to_json()
        manifest = {"inputs": [spec], "outputs": [spec], "tile": {"overlap": overlap}}
        session = Session(Bundle(Path(), manifest), run)
        rows.append({"overlap": overlap, **compare(session, photos, tile, overlap, sigma)})
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "what": f"mallenet-s float32 in PyTorch, tile {tile}, sigma {sigma:g}, {len(photos)} photos",
        "rows": rows,
    }
    measurement.write(out, record)


def compare(
    session: Session, photos: list[np.ndarray], tile: int, overlap: int, sigma: float
) -> dict[str, float]:
    """Return the figures of one overlap, averaged over the photos."""
    figures = []
    for index, truth in enumerate(photos):
        noisy = add_noise(truth, sigma, seed=index)
        whole = session.run(np.ascontiguousarray(noisy.transpose(2, 0, 1)[None]))[0][0].transpose(1, 2, 0)
        tiled = session.process(noisy)
        difference = tiled - whole
        figures.append(
            {
                "psnr_drop_db": metrics.psnr_db(whole, truth) - metrics.psnr_db(tiled, truth),
                "mean_abs_levels": metrics.mean_abs_levels(tiled, whole),
                "max_abs_levels": 255 * metrics.max_abs(tiled, whole),
                "step_at_seam": step_at_seam(difference, tile, overlap),
            }
        )
    return {key: round(float(np.mean([f[key] for f in figures])), 4) for key in figures[0]}


def step_at_seam(difference: np.ndarray, tile: int, overlap: int) -> float:
    """Return the mean jump between columns at borders of the tiles' kept parts, over that elsewhere."""
    jumps = np.abs(np.diff(difference, axis=1)).mean(axis=(0, 2))
    edges = set()
    for t in tiles(*difference.shape[:2], tile, tile, overlap):
        counted = np.flatnonzero(t.columns) + t.left
        edges |= {int(counted[0]), int(counted[-1]) + 1} - {0, difference.shape[1]}
    seam = [edge - 1 for edge in sorted(edges) if 0 < edge <= len(jumps)]
    elsewhere = np.delete(jumps, seam)
    return float(jumps[seam].mean() / elsewhere.mean())


if __name__ == "__main__":
    typer.run(main)
