"""What tests of image sets share: waves as images, manifests of them, and what a set is refused with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from edgedyn.errors import CalibrationError
from edgedyn.images.image_set import open_set
from edgedyn.images.sample import Sample

SHAPE = (1, 3, 32, 48)
NOISE = {"sigma": [15.0, 25.0, 50.0], "clip": False}
RAW = {"width": 48, "height": 40, "bits": 10, "pattern": "RGGB", "black": 64, "white": 960}


def waves(seed: int = 0, size: tuple[int, int] = (90, 70)) -> np.ndarray:
    """Waves in mid-range, so that noise of a few levels is never clipped; (H, W, 3) uint8."""
    y, x = np.mgrid[: size[0], : size[1]]
    colours = [128 + 40 * np.sin((x * (c + 1) + y * (seed + 2)) / 7 + seed) for c in range(3)]
    return np.stack(colours, axis=2).astype(np.uint8)


def save_image(path: Path, *, seed: int = 0, size: tuple[int, int] = (90, 70), gray: bool = False) -> Path:
    pixels = waves(seed, size)
    Image.fromarray(pixels[:, :, 0] if gray else pixels).save(path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(path: Path) -> dict[str, str]:
    """What a manifest says of a file."""
    return {"name": path.name, "sha256": digest(path)}


def write_set(folder: Path, names=("a.png", "b.png"), **changes) -> Path:
    files = [save_image(folder / name, seed=k) for k, name in enumerate(names)]
    values = {
        "name": "waves",
        "licence": "CC0",
        "root": ".",
        "samples": 5,
        "noise": NOISE,
        "files": [entry(file) for file in files],
        **changes,
    }
    path = folder / "set.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_pairs(folder: Path, *, sigma: float = 20.0, count: int = 2, **changes) -> Path:
    """Write a set of noisy images, each with its clean one."""
    files = []
    for k in range(count):
        clean = save_image(folder / f"{k}.clean.png", seed=k)
        noise = np.random.default_rng(k).normal(0, sigma, (90, 70, 3))
        noisy = folder / f"{k}.noisy.png"
        Image.fromarray((waves(k) + noise).clip(0, 255).round().astype(np.uint8)).save(noisy)
        files.append({**entry(noisy), "clean": entry(clean)})
    return write_set(folder, names=(), **{"noise": {"kind": "real"}, "files": files, **changes})


def draw(path: Path, shape: tuple[int, ...] = SHAPE) -> list[Sample]:
    return list(open_set(path).draw([shape]))


def refused(call, *arguments) -> str:
    with pytest.raises(CalibrationError) as caught:
        list(call(*arguments).draw([SHAPE]))
    assert caught.value.exit_code == 5
    return str(caught.value)
