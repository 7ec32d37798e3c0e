"""A build whose validation photos are noisy and have no clean ones: compared with float, and said so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

import edgedyn
from edgedyn.cli.app import execute
from edgedyn.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.network=small_networks:wide_convolutions", "model.weights=null", "model.arguments={}"]
SMALL += ["input.shape=[1, 3, 32, 48]", "tile.overlap=0", "quantize.keep_float=[]", "quantize.dynamic=[]"]
SMALL += ["quantize.rounding=nearest", "limits.int8_share=0"]


def test_noisy_photos_alone_validate_int8_against_float(tmp_path):
    (tmp_path / "noisy").mkdir()
    for k in range(3):
        photo = skimage.data.coffee()[60 * k : 60 * k + 100, 100:250].astype(float)
        noisy = (photo + np.random.default_rng(k).normal(0, 15, photo.shape)).clip(0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / f"noisy/{k}.png")
    command = ["calibrate", "--make-manifest", str(tmp_path / "noisy"), "-o", str(tmp_path / "noisy.yaml")]
    assert execute([*command, "--set", "noise.kind=real", "--set", "samples=3"]) == 0
    given = [*SMALL, f"validation={tmp_path / 'noisy.yaml'}"]
    recipe = load_recipe(RECIPES / "mallenet-s.phone.int8.yaml", given)
    built = edgedyn.build(recipe, tmp_path / "out", compare=False)
    assert built.report.ok, built.report
    rows = {f"{row.between} {row.metric.partition('[')[0]}": row for row in built.report.rows}
    assert rows["float:truth images_without_truth"].value == 3
    assert rows["device:float sqnr_db"].value > 15
    assert rows["device:float residual_sqnr_db"].samples == 3
    assert 0 < rows["device:float max_abs"].value < 1
    place = rows["device:float worst_tile_rms_levels"].metric.partition("[")[2]
    assert place in {f"{k}.png x=0 y=0]" for k in range(3)}
    assert not any("psnr" in name or "ssim" in name for name in rows)
    assert "no truth was there" in (tmp_path / "out/report.html").read_text()
    facts = json.loads((tmp_path / "out/manifest.json").read_text())["facts"]
    assert "no PSNR" in facts["truth"]
