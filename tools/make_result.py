"""Make the README's picture from a built bundle: noisy, float32 in PyTorch, INT8 in the bundle's runtime.

python tools/make_result.py demo-out/bundle docs/result.jpg    after make demo
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
import torch
import typer
from make_noisy import add_noise
from PIL import Image, ImageDraw

from edgedyn.bench.benchmark import stored_recipe
from edgedyn.device.session import open_session
from edgedyn.images import metrics
from edgedyn.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
CUT = np.s_[20:340, 150:470]


def main(bundle: Path, out: Path, sigma: float = 25.0, seed: int = 0) -> None:
    truth = skimage.data.coffee().astype(np.float32) / 255
    noisy = add_noise(truth, sigma, seed)
    model = load_recipe(ROOT / "recipes/mallenet-s.phone.int8.yaml").load_model()
    with torch.no_grad():
        float_ = model(torch.from_numpy(noisy.transpose(2, 0, 1)[None]))[0].numpy().transpose(1, 2, 0)
    session = open_session(bundle)
    device = session.process(noisy)
    kernels = stored_recipe(session.bundle).kernels
    names = ("noisy", "float32", f"{session.bundle.precision}, {session.bundle.target}, {kernels} kernels")
    panels = []
    for name, image in zip(names, (noisy, float_, device), strict=True):
        panel = Image.fromarray((image[CUT].clip(0, 1) * 255).round().astype(np.uint8))
        canvas = Image.new("RGB", (panel.width, panel.height + 22), "white")
        canvas.paste(panel, (0, 0))
        text = f"{name}   {metrics.psnr_db(image, truth):.2f} dB"
        ImageDraw.Draw(canvas).text((4, panel.height + 5), text, fill="black")
        panels.append(canvas)
        print(text)
    width = sum(p.width for p in panels) + 8 * (len(panels) - 1)
    sheet = Image.new("RGB", (width, panels[0].height), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index * (panel.width + 8), 0))
    sheet.save(out, optimize=True, quality=92)


if __name__ == "__main__":
    typer.run(main)
