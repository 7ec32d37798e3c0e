"""Write a photo with Gaussian noise: the coffee cup that scikit-image installs (CC0), sigma 25.

python tools/make_noisy.py OUT.png [--sigma 25]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import typer
from PIL import Image


def main(
    out: Path, sigma: Annotated[float, typer.Option(help="noise level, 0..255 scale")] = 25.0, seed: int = 0
) -> None:
    noisy = add_noise(skimage.data.coffee().astype(np.float32) / 255, sigma, seed)
    Image.fromarray((noisy * 255).clip(0, 255).round().astype(np.uint8)).save(out)


def add_noise(truth: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Add white Gaussian noise, unclipped, to float32 values in [0, 1]; ``sigma`` on the 0..255 scale."""
    noise = np.random.default_rng(seed).standard_normal(truth.shape, dtype=np.float32)
    return truth + np.float32(sigma / 255) * noise


if __name__ == "__main__":
    typer.run(main)
