"""Measure a recipe on a folder of images: float and INT8 by engine, in the real runtime, by noise level.

    python tools/evaluate.py RECIPE IMAGES [--engines nncf,torchao] [--out FILE.json]

Images are cut to multiples of 32 and turned to landscape, so that one program serves all of a size; noise is
white, Gaussian, unclipped and seeded by the image's number. Everything runs through the target's own runtime.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

from edgedyn import metrics, ops, pipeline
from edgedyn.imaging import read_image
from edgedyn.layers import canonicalize
from edgedyn.recipe import Recipe, load_recipe
from edgedyn.targets import Artifact


def main(
    recipe: Path,
    images: Path,
    engines: Annotated[str, typer.Option(help="comma-separated: nncf, torchao")] = "nncf,torchao",
    sigmas: Annotated[str, typer.Option(help="comma-separated, 0..255 scale")] = "15,25,50",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="recipe values, a.b=c")] = None,
    limit: Annotated[int, typer.Option(help="first N images only; 0 is all")] = 0,
    trust: bool = False,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
) -> None:
    truths = [load(path) for path in sorted(images.iterdir())[: limit or None]]
    shape = [1, 3, *truths[0].shape[2:]]
    settings = [*(overrides or []), f"input.shape={shape}"]
    variants = {"float32": [*settings, "precision=fp32"]}
    for engine in engines.split(","):
        variants[f"int8 {engine}"] = [*settings, "precision=int8", f"quantize.engine={engine}"]
    results: dict[str, Any] = {}
    for name, values in variants.items():
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
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {
            name: version(name) for name in ("torch", "executorch", "torchao", "nncf", "onnxruntime")
        },
        "command": shlex.join(["python", "tools/evaluate.py", recipe.name, images.name, *sys.argv[3:]]),
    }
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> np.ndarray:
    """Read an image as (1, 3, H, W), landscape, H and W multiples of 32."""
    pixels = read_image(path).pixels
    pixels = pixels.transpose(1, 0, 2)[::-1] if pixels.shape[0] > pixels.shape[1] else pixels
    height, width = (size // 32 * 32 for size in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width].transpose(2, 0, 1)[None])


def deploy(recipe: Recipe, *, trust: bool) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Bring a recipe to a running program; returns it with the INT8 share of multiply-adds."""
    folder = Path(tempfile.mkdtemp(prefix="edgedyn-"))
    artifact, share = lower_recipe(recipe, folder, trust=trust)
    run = pipeline.load_target(recipe).load(folder / artifact.files[0])
    return lambda x: run(x)[0], share


def lower_recipe(recipe: Recipe, folder: Path, *, trust: bool) -> tuple[Artifact, float]:
    """Lower a recipe into a folder, without validation and bundle; the straight line's first half."""
    folder.mkdir(parents=True, exist_ok=True)
    target = pipeline.load_target(recipe)
    calibration, samples = pipeline.load_sets(recipe)
    inputs = (torch.from_numpy(samples[0].noisy),)
    captured = pipeline.capture(canonicalize(recipe.load_model(trust=trust)), inputs)
    forms = ops.choose_forms(captured, target, recipe.forms)
    expanded = ops.expand(captured, forms, "before_quantize")
    quantized = pipeline.apply_precision(expanded, inputs, recipe, target, calibration, lambda *_: None)
    program = ops.expand(quantized.program, forms, "after_quantize")
    return target.lower(program, folder, recipe.precision), quantized.int8_mac_share


def score(run: Callable[[np.ndarray], np.ndarray], truth: np.ndarray, sigma: float, index: int) -> float:
    """Return the PSNR of one image, dB."""
    noise = np.random.default_rng(index).standard_normal(truth.shape, dtype=np.float32)
    return metrics.psnr_db(run(truth + np.float32(sigma / 255) * noise), truth)


def quiet() -> bool:
    """Whether stderr is no terminal."""
    return not sys.stderr.isatty()


if __name__ == "__main__":
    typer.run(main)
