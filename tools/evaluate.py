"""Measure INT8 recipes against their float program on a folder of images, in their real runtime.

    python tools/evaluate.py RECIPE IMAGES [--variant "quantize.equalize=false"] [--out FILE]
    python tools/evaluate.py recipes/ffdnet-color.phone.int8.yaml CBSD68 --trust --set model.weights=PATH \
        --level-key model.arguments.sigma

Images are cropped to multiples of 32 and turned to landscape, so that one program serves all of a size. Noise
is white, Gaussian, unclipped and seeded by the image's number. The programs run in turn on each image, in the
target's own runtime, so that their times can be compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import measurement
import numpy as np
import typer
from lowering import load_lowered, lower_recipe
from make_noisy import add_noise
from rich.progress import track

from edgedyn.bundle.dispatch import Dispatcher
from edgedyn.images import metrics
from edgedyn.images.formats import SUFFIXES
from edgedyn.images.photo import read_image
from edgedyn.recipe.recipe import load_recipe
from edgedyn.targets.quiet import quiet_libraries

FLOAT = "float32"


def main(
    recipe: Path,
    images: Path,
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", help="INT8 with these recipe values, 'a.b=c d=e'; repeat it to compare"),
    ] = None,
    sigmas: Annotated[str, typer.Option(help="comma-separated, 0..255 scale")] = "15,25,50",
    level_key: Annotated[
        str, typer.Option(help="recipe key of the noise level, for a network that is conditioned on it")
    ] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="recipe values, a.b=c")] = None,
    limit: Annotated[int, typer.Option(help="first N images only; 0 is all")] = 0,
    trust: bool = False,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
) -> None:
    colors = load_recipe(recipe, overrides or []).input.shape[1]
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    truths = [load(path, colors) for path in files[: limit or None]]
    size = list(truths[0].shape)
    settings = {FLOAT: ["precision=fp32"]} | {name or "INT8": name.split() for name in variants or [""]}
    settings = {name: [*(overrides or []), f"input.shape={size}", *v] for name, v in settings.items()}
    results: dict[str, dict[str, Any]] = {name: {} for name in settings}
    programs: dict[str, Dispatcher] = {}
    for sigma in map(float, sigmas.split(",")):
        level = [f"{level_key}={sigma}"] if level_key else []
        for name, values in settings.items():
            if name not in programs or level:
                programs[name], results[name]["int8_mac_share"] = deploy(recipe, [*values, *level], trust)
        measured = compare(programs, truths, sigma)
        for name, values in measured.items():
            results[name] |= {f"{metric}[sigma={sigma:g}]": value for metric, value in values.items()}
            print(f"sigma {sigma:g}, {name}: {json.dumps(values)}", flush=True)
        record = {"recipe": recipe.stem, "set": images.name, "images": len(truths), "size": size}
        measurement.write(out, {**record, "results": results})


def load(path: Path, colors: int = 3) -> np.ndarray:
    """Read an image as (1, C, H, W), landscape, H and W multiples of 32."""
    pixels = read_image(path).pixels
    if pixels.shape[2] != colors:
        raise typer.BadParameter(f"{path} has {pixels.shape[2]} channels; the recipe's input has {colors}")
    pixels = pixels.transpose(1, 0, 2)[::-1] if pixels.shape[0] > pixels.shape[1] else pixels
    height, width = (size // 32 * 32 for size in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width].transpose(2, 0, 1)[None])


def deploy(recipe: Path, values: list[str], trust: bool) -> tuple[Dispatcher, float]:
    """Lower and load a recipe; return its program and the INT8 share of multiply-adds."""
    with tempfile.TemporaryDirectory(prefix="edgedyn-") as folder, quiet_libraries():
        share = lower_recipe(load_recipe(recipe, values), Path(folder), trust=trust)
        return load_lowered(Path(folder)), round(share, 4)


def compare(
    programs: dict[str, Dispatcher], truths: list[np.ndarray], sigma: float
) -> dict[str, dict[str, float]]:
    """Run the programs in turn on every image; return PSNR, its drop against float, and the speed-up."""
    psnr: dict[str, list[float]] = {name: [] for name in programs}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for index, truth in enumerate(track(truths, f"sigma {sigma:g}", disable=not sys.stderr.isatty())):
        noisy = add_noise(truth, sigma, seed=index)
        for name, run in programs.items():
            start = time.perf_counter()
            y = run(noisy)[0]
            seconds[name].append(time.perf_counter() - start)
            psnr[name].append(metrics.psnr_db(y, truth))
    base = np.array(psnr[FLOAT])
    return {
        name: {
            "psnr_db": round(float(np.mean(values)), 3),
            "drop_db": round(float(np.mean(base - values)), 4),
            "worst_drop_db": round(float(np.max(base - values)), 4),
            "speed_over_float": round(float(np.median(seconds[FLOAT]) / np.median(seconds[name])), 2),
        }
        for name, values in psnr.items()
    }


if __name__ == "__main__":
    typer.run(main)
