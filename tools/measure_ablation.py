"""Measure what each switch of the INT8 method is worth: a recipe's drop, and that with one thing changed.

    python tools/measure_ablation.py recipes/mallenet-s.phone.int8.yaml --out docs/measurements/ablation.json
                                     [--trust --set model.weights=PATH]

The recipe's rows take the place of its own in a file that is there already. What was measured is remembered:
an interrupted run goes on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import measurement
import typer

from edgedyn import pipeline
from edgedyn.cli.terminal import progress_bars
from edgedyn.recipe.recipe import load_recipe
from edgedyn.targets.quiet import quiet_libraries


def main(
    recipe: Path,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="recipe values, a.b=c")] = None,
    trust: bool = False,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
) -> None:
    asked = load_recipe(recipe, overrides or [])
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder, progress_bars() as advance:
        table = pipeline.calibrate(
            asked,
            Path(folder) / "table.json",
            trust=trust,
            ablation=True,
            progress=advance,
        )
    drops = name_drops(table.ablation)
    row = {"drop_db": drops, "shape": list(asked.input.shape), "calibration": table.images["name"]}
    add_row(out, asked.name, row | measurement.provenance())
    print(json.dumps(drops, indent=1))


def name_drops(ablation: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what was changed and its drop, dB, with the name of the program where there are several."""
    return {
        what if len(ablation) == 1 else f"{name}: {what}": round(drop, 4)
        for name, program in ablation.items()
        for what, drop in program.items()
    }


def add_row(path: Path | None, name: str, row: dict[str, Any]) -> None:
    """Put a recipe's measurement into the file, beside those of others; nothing where no path is given."""
    if path is not None:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**rows, name: row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
