"""Measure a recipe on a folder of images: float and INT8 by engine, in the real runtime, by noise level.

    python tools/evaluate.py RECIPE IMAGES [--engines nncf,torchao] [--keep-float heads.0,tail] [--out FILE]

Images are cut to multiples of 32 and turned to landscape, so that one program serves all of a size; noise is
white, Gaussian, unclipped and seeded by the image's number. Everything runs through the target's own runtime.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import measurement
import numpy as np
import typer
from lowering import load_lowered, lower_recipe
from make_noisy import add_noise
from rich.progress import track

from edgedyn import metrics
from edgedyn.imaging import SUFFIXES, read_image
from edgedyn.recipe import Recipe, load_recipe
from edgedyn.terminal import quiet_libraries


def main(
    recipe: Path,
    images: Path,
    engines: Annotated[str, typer.Option(help="comma-separated: nncf, torchao")] = "nncf,torchao",
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="patterns left float, comma-separated, none for none; give it again to compare"),
    ] = None,
    sigmas: Annotated[str, typer.Option(help="comma-separated, 0..255 scale")] = "15,25,50",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="recipe values, a.b=c")] = None,
    limit: Annotated[int, typer.Option(help="first N images only; 0 is all")] = 0,
    trust: bool = False,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
) -> None:
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    truths = [load(path) for path in files[: limit or None]]
    shape = [1, 3, *truths[0].shape[2:]]
    settings = [*(overrides or []), f"input.shape={shape}"]
    variants = {"float32": [*settings, "precision=fp32"]}
    for engine in engines.split(","):
        int8 = [*settings, "precision=int8", f"quantize.engine={engine}"]
        for patterns in keep_float or []:
            kept = [] if patterns == "none" else patterns.split(",")
            variants[f"int8 {engine}, float: {patterns}"] = [*int8, f"quantize.keep_float={kept}"]
        if not keep_float:
            variants[f"int8 {engine}"] = int8
    results: dict[str, Any] = {}
    for name, values in variants.items():
        with quiet_libraries():
            run, share = deploy(load_recipe(recipe, values), trust=trust)
        results[name] = {"int8_mac_share": round(share, 4)}
        for sigma in map(float, sigmas.split(",")):
            label = f"{name} sigma {sigma:g}"
            psnr = [score(run, x, sigma, i) for i, x in enumerate(track(truths, label, disable=quiet()))]
            results[name][f"psnr_db[sigma={sigma:g}]"] = round(float(np.mean(psnr)), 3)
        print(name, json.dumps(results[name]), flush=True)
    record = {
        "recipe": recipe.name,
        "set": images.name,
        "images": len(truths),
        "size": shape,
        "results": results,
    }
    measurement.write(out, record)


def load(path: Path) -> np.ndarray:
    """Read an image as (1, 3, H, W), landscape, H and W multiples of 32."""
    pixels = read_image(path).pixels
    pixels = pixels.transpose(1, 0, 2)[::-1] if pixels.shape[0] > pixels.shape[1] else pixels
    height, width = (size // 32 * 32 for size in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width].transpose(2, 0, 1)[None])


def deploy(recipe: Recipe, *, trust: bool) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Bring a recipe to a running program; returns it with the INT8 share of multiply-adds."""
    with tempfile.TemporaryDirectory(prefix="edgedyn-") as folder:
        share = lower_recipe(recipe, Path(folder), trust=trust)
        run = load_lowered(Path(folder))
    return lambda x: run(x)[0], share


def score(run: Callable[[np.ndarray], np.ndarray], truth: np.ndarray, sigma: float, index: int) -> float:
    """Return the PSNR of one image, dB."""
    return metrics.psnr_db(run(add_noise(truth, sigma, seed=index)), truth)


def quiet() -> bool:
    """Whether stderr is no terminal."""
    return not sys.stderr.isatty()


if __name__ == "__main__":
    typer.run(main)
