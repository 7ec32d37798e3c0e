"""Measure the effect of each switch of the INT8 method: a recipe's PSNR drop with one switch changed.

    python tools/measure_ablation.py recipes/mallenet-s.phone.int8.yaml --out docs/measurements/ablation.json
                                     [--trust --set model.weights=PATH]

In an existing file it replaces the rows of this recipe only. Measurements are cached: an interrupted run
continues.
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
    parsed = load_recipe(recipe, overrides or [])
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder, progress_bars() as advance:
        table = pipeline.calibrate(
            parsed,
            Path(folder) / "table.json",
            trust=trust,
            ablation=True,
            progress=advance,
        )
    drops = name_drops(table.ablation)
    row = {"drop_db": drops, "shape": list(parsed.input.shape), "calibration": table.images["name"]}
    add_row(out, parsed.name, row | measurement.provenance())
    print(json.dumps(drops, indent=1))


def name_drops(ablation: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the drop of each changed switch, dB; its name includes the program where there are several."""
    return {
        switch if len(ablation) == 1 else f"{name}: {switch}": round(drop, 4)
        for name, program in ablation.items()
        for switch, drop in program.items()
    }


def add_row(path: Path | None, name: str, row: dict[str, Any]) -> None:
    """Add a recipe's measurement to a file, beside those of other recipes; a path of None writes nothing."""
    if path is not None:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**rows, name: row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
