"""Train by recipes; write safetensors and a training card beside them. Resumable.

python tools/train.py recipes/train/malle-ffdnet.yaml --data DIR --out malle-ffdnet.safetensors
python tools/train.py --queue recipes/train --data DIR --checkpoints DIR

The weights are the averaged ones of the last measurement, at the end those of the last step. A queue
trains one recipe after the other, skips those that are finished, and puts weights beside the checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import measurement
import torch
import typer
from safetensors.torch import save

from edgedyn.errors import EdgedynError, UsageError
from edgedyn.files import replace_files, to_json
from edgedyn.recipe.networks import find_network
from edgedyn.training.denoise import plan_card
from edgedyn.training.recipe import TrainingRecipe, load_training_recipe
from edgedyn.training.run import Result, run_recipe

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 3 * 2**20  # as tests/test_wheel.py


def main(
    recipe: Annotated[Path | None, typer.Argument(help="training recipe, YAML")] = None,
    data: Annotated[
        Path, typer.Option(envvar="EDGEDYN_DATA", help="folder at which the recipe's paths start")
    ] = Path("."),
    out: Annotated[
        Path | None, typer.Option(help="weights, .safetensors; the card beside them, .json")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="folder of checkpoint and log; default: beside --out, .training")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="safetensors to continue from, where there is no checkpoint")
    ] = None,
    queue: Annotated[
        Path | None, typer.Option(help="in place of RECIPE: a folder of recipes, or a text file of paths")
    ] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="with --queue: a folder per recipe in it")] = None,
    trust: Annotated[bool, typer.Option(help="run the code of networks from anywhere")] = False,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    try:
        if queue is None and recipe is not None and out is not None:
            train_one(recipe, data, out, checkpoint or out.with_suffix(".training"), start_from, trust=trust)
        elif queue is not None and checkpoints is not None and recipe is None:
            sys.exit(train_queue(queue, data, checkpoints, trust=trust))
        else:
            raise UsageError("expected RECIPE and --out, or --queue and --checkpoints.")
    except EdgedynError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def train_queue(queue: Path, data: Path, checkpoints: Path, *, trust: bool = False) -> int:
    """Train every recipe; one that fails does not stop the others. Return the exit code.

    Nobody named these recipes one by one: without ``trust`` their networks are edgedyn's own.
    """
    failed = 0
    for path in queued(queue):
        print(f"{path.name}:", flush=True)
        try:
            recipe = load_training_recipe(path)
            for section in (recipe.model, recipe.teacher):
                find_network(section.network, trust=trust, is_named=False)
            folder = checkpoints / path.stem
            folder.mkdir(parents=True, exist_ok=True)
            train_one(path, data, folder / f"{path.stem}.safetensors", folder, trust=trust)
        except EdgedynError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = error.exit_code
    return failed


def queued(queue: Path) -> list[Path]:
    """Return the recipes of a folder by name, or those of a text file, one path per line, in its order."""
    if queue.is_dir():
        found = sorted(queue.glob("*.yaml"))
    elif queue.is_file():
        lines = [line.strip() for line in queue.read_text(encoding="utf-8").splitlines()]
        found = [queue.parent / line for line in lines if line and not line.startswith("#")]
    else:
        found = []
    if not found:
        raise UsageError(
            f"queue {queue} has no recipes; expected a folder of YAML files, or a list of paths."
        )
    return found


def train_one(
    path: Path, data: Path, out: Path, folder: Path, start_from: Path | None = None, *, trust: bool = False
) -> None:
    """Train by a recipe unless its card says that it is finished."""
    recipe = load_training_recipe(path)
    if start_from is not None:
        recipe = recipe.model_copy(update={"start_from": os.path.abspath(start_from)})
    card = out.with_suffix(".json")
    if is_finished(recipe, out, card):
        print(f"finished: {out.name}", flush=True)
        return
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if (step + 1) % 100 == 0:
            print(step + 1, f"{sum(losses[-100:]) / len(losses[-100:]):.5f}", flush=True)

    run_recipe(recipe, data, folder, lambda result: write(recipe, result, out), report, trust=trust)


def is_finished(recipe: TrainingRecipe, out: Path, card: Path) -> bool:
    """Tell whether weights of this recipe's last step are there."""
    if not out.exists() or not card.exists():
        return False
    values = json.loads(card.read_text(encoding="utf-8"))
    return bool(values.get("recipe_sha256") == recipe.digest() and values.get("step") == recipe.plan.steps)


def write(recipe: TrainingRecipe, result: Result, out: Path) -> None:
    """Write weights and card together."""
    state = {name: tensor.detach().contiguous() for name, tensor in result.network.state_dict().items()}
    weights = save(state)
    if len(weights) > MOST_BYTES:
        raise UsageError(f"the weights have {len(weights)} bytes; expected at most {MOST_BYTES}.")
    card = {
        "network": recipe.model.network,
        "arguments": recipe.model.arguments,
        "licence": recipe.teacher.licence,
        "recipe": recipe.name,
        "recipe_sha256": recipe.digest(),
        "teacher": recipe.teacher.model_dump(exclude={"licence"}),
        "start_from": recipe.start_from and Path(recipe.start_from).name,
        "cut": recipe.cut and recipe.cut.model_dump(),
        "data": {"folders": recipe.images, "validation": [v.model_dump() for v in recipe.validation]},
        "noise": "white Gaussian, unclipped, sigma uniform in plan.sigma (0..255 scale), not blind",
        "plan": plan_card(recipe.plan.plan()),
        "step": result.step,
        "seconds": round(result.seconds),
        **measurement.provenance(),
        "psnr_db": _rounded(result.psnr_db),
        "teacher_psnr_db": _rounded(result.teacher_psnr_db),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_files({out: weights, out.with_suffix(".json"): to_json(card).encode()})
    print(result.step, json.dumps(card["psnr_db"]), flush=True)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    typer.run(main)
