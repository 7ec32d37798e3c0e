"""Tiles of content-dependent kernels leave no visible seams: the trained network on a real photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from measure_seams import compare

from edgedyn.bundle.bundle import Bundle
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.device.session import Session
from edgedyn.recipe.recipe import load_recipe

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes/mallenet-s.phone.fp32.yaml")
TILE = RECIPE.input.shape[2]


@pytest.fixture(scope="module")
def run():
    model = RECIPE.load_model()

    def run(x: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [model(torch.from_numpy(x)).numpy()]

    return run


def figures(run, overlap: int) -> dict[str, float]:
    photo = skimage.data.coffee().astype(np.float32) / 255
    spec = TensorSpec("image", "float32", (1, 3, TILE, TILE), "").to_json()
    session = Session(
        Bundle(Path(), {"inputs": [spec], "outputs": [spec], "tile": {"overlap": overlap}}), run
    )
    return compare(session, [photo], TILE, overlap, sigma=25)


def test_recipes_overlap_leaves_no_step_at_tile_borders(run):
    found = figures(run, RECIPE.tile.overlap)
    assert found["step_at_seam"] < 1.25  # 1 is what the difference does anywhere else
    assert found["psnr_drop_db"] < 0.05


def test_tiles_without_overlap_have_seams_which_the_measure_sees(run):
    assert figures(run, 0)["step_at_seam"] > 1.5
