"""From a network of your own to an INT8 bundle, calibrated from a data loader.

python examples/own_network.py PHOTO... -o OUT

The network here has initial weights, so its quality is reported and not demanded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import edgedyn
from edgedyn.images.noise import NoiseSection
from edgedyn.layers.ddf import DDFPack


def make_network(channels: int = 8) -> nn.Module:
    """Return a denoiser with one dynamic layer, (B, 3, H, W) in and out."""
    first, last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), DDFPack(channels), last)


def crops(photo: Path, size: int = 64) -> Iterator[Tensor]:
    """Yield tiles of a photo (3, size, size) in [0, 1], as a data loader of yours would."""
    pixels = torch.from_numpy(np.asarray(Image.open(photo).convert("RGB"))).permute(2, 0, 1).float() / 255
    for top in range(0, pixels.shape[1] - size, 2 * size):
        for left in range(0, pixels.shape[2] - size, 2 * size):
            yield pixels[:, top : top + size, left : left + size]


def main() -> None:
    """Build the bundle and print its failed checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    arguments = parser.parse_args()

    recipe = edgedyn.load_recipe(Path(__file__).with_suffix(".yaml"))
    loader = [tile for photo in arguments.photos for tile in crops(photo)]
    noise = NoiseSection(sigma=[15.0, 25.0, 50.0], clip=False)
    calibration = edgedyn.CalibrationSet.of(loader, samples=8, noise=noise)
    built = edgedyn.build(recipe, arguments.out, calibration=calibration)
    print(built.bundle.precision, built.to_json()["forms"])
    print("failed:", [row.metric for row in built.report.rows if not row.passed])


if __name__ == "__main__":
    main()
