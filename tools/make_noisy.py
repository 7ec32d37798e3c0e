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


def main(out: Path, sigma: Annotated[float, typer.Option(help="0..255 scale")] = 25.0, seed: int = 0) -> None:
    photo = skimage.data.coffee().astype(np.float32)
    noisy = photo + sigma * np.random.default_rng(seed).standard_normal(photo.shape, dtype=np.float32)
    Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(out)


if __name__ == "__main__":
    typer.run(main)
