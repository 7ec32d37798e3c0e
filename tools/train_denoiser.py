"""Train a denoiser on a folder of images; write safetensors and a training card. Resumable.

python tools/train_denoiser.py IMAGES --validation IMAGES --out recipes/weights/mallenet-s.safetensors
    [--network dynconv_denoiser --budget 0.5]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import measurement
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from edgedyn.checkpoints.weights import load_weights
from edgedyn.recipe.networks import find_network
from edgedyn.training.denoise import TrainingPlan, load_images, plan_card, train
from edgedyn.training.masks import MaskBudget
from edgedyn.training.run import psnr

SIGMAS = (15, 25, 50)


def main(
    images: Annotated[Path, typer.Argument(help="folder of training images")],
    validation: Annotated[Path, typer.Option(help="folder of images to measure the PSNR on, disjoint")],
    out: Annotated[Path, typer.Option(help="weights, .safetensors; the card lies beside them, .json")],
    network: Annotated[str, typer.Option(help="one of: edgedyn list networks")] = "mallenet",
    arguments: Annotated[str, typer.Option(help="the network's arguments except colors, JSON")] = "{}",
    colors: Annotated[int, typer.Option(help="3 or 1")] = 3,
    steps: int = 10000,
    batch: int = 8,
    patch: int = 64,
    learning_rate: float = 1e-3,
    freeze_norms: int = 2000,
    budget: Annotated[float, typer.Option(help="share of active positions, for a network with masks")] = 0.0,
    keep: Annotated[
        float, typer.Option(help="with --budget: how close each block must stay to it at the end, 0 to 1")
    ] = 0.0,
    seed: int = 0,
    start_from: Annotated[
        Path | None, typer.Option(help="safetensors to start from; --freeze-norms is then 0")
    ] = None,
    fast: Annotated[bool, typer.Option(help="bfloat16 and torch.compile; needs a C++ compiler")] = True,
    checkpoint: Annotated[Path | None, typer.Option(help="default: beside --out, .resume.pt")] = None,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    plan = TrainingPlan(
        steps=steps,
        batch=batch,
        patch=patch,
        learning_rate=learning_rate,
        freeze_norms=0 if start_from else freeze_norms,
        seed=seed,
        bfloat16=fast,
        compile=fast,
    )
    training = load_images(images, gray=colors == 1)
    held_out = load_images(validation, gray=colors == 1)
    started = json.loads(start_from.with_suffix(".json").read_text()) if start_from else None
    torch.manual_seed(seed)
    options = {**json.loads(arguments), "colors": colors}
    model = find_network(network, options)(**options)
    penalty = MaskBudget(model, budget, keep=keep) if budget else None
    if start_from:
        load_weights(model, start_from)
    with _bar(plan.steps) as report:
        model, seconds = train(
            model,
            training,
            plan,
            checkpoint or out.with_suffix(".resume.pt"),
            penalty=penalty,
            report=report,
        )
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out)
    card = {
        "network": network,
        "arguments": options,
        **({"budget": budget, "keep": keep} if budget else {}),
        "data": {"folder": images.name, "images": len(training)},
        "noise": "white Gaussian, unclipped, sigma uniform in plan.sigma (0..255 scale), blind",
        "plan": plan_card(plan),
        "start_from": started,
        "seconds": round(seconds),
        **measurement.provenance(),
        "psnr_db": {
            "set": validation.name,
            "images": len(held_out),
            **{f"sigma={sigma}": measure(model, held_out, sigma) for sigma in SIGMAS},
        },
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card["psnr_db"]))


def measure(model: nn.Module, images: list[Tensor], sigma: float) -> float:
    """Return the mean PSNR over whole images with seeded unclipped noise; in float32."""
    values = [psnr(model, image[None].float() / 255, sigma, seed) for seed, image in enumerate(images)]
    return round(sum(values) / len(values), 3)


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[int, float, nn.Module], None]]:
    """Show a progress bar on a terminal, else print a line every 100 steps."""
    recent: list[float] = []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    task = bar.add_task("train", total=steps)

    def report(step: int, loss: float, averaged: nn.Module) -> None:
        recent.append(loss)
        del recent[:-100]
        mean = sum(recent) / len(recent)
        bar.update(task, completed=step + 1, description=f"loss {mean:.5f}")
        if (step + 1) % 100 == 0 and not sys.stderr.isatty():
            print(step + 1, f"{mean:.5f}", flush=True)

    with bar:
        yield report


if __name__ == "__main__":
    typer.run(main)
