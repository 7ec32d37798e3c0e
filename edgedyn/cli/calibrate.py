"""``edgedyn calibrate``: the calibration table alone, and what INT8 costs by layer and by switch."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edgedyn.cli.options import Force, RecipePath, Set, Trust
from edgedyn.cli.terminal import OUT, AsJson, print_json, progress_bars
from edgedyn.targets.quiet import quiet_libraries

if TYPE_CHECKING:
    from edgedyn.quantize.table.entries import Precision


def calibrate(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("-o", "--out", help="the table, a JSON file; new")],
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="also float ONNX and calibration cache, for TensorRT up to 10 without Q/DQ"
        ),
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
    force: Force = False,
    trust: Trust = False,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="measure what INT8 costs in each layer; goes on if interrupted"),
    ] = False,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="measure what each switch of the method is worth")
    ] = False,
) -> None:
    """Write only the calibration table, which builds reuse: quantize.table in the recipe names it."""
    from edgedyn.recipe.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    with quiet_libraries(), progress_bars() as advance:
        from edgedyn import pipeline

        table = pipeline.calibrate(
            parsed,
            out,
            force=force,
            trust=trust,
            cache=cache,
            sensitivity=sensitivity,
            ablation=ablation,
            progress=advance,
        )
    kinds: Counter[str] = Counter(entry.kind for entries in table.programs.values() for entry in entries)
    if as_json:
        covered = [asdict(outcome) for outcome in table.coverage]
        precision = {name: p.to_json() for name, p in table.precision.items()}
        facts = {"images": table.images, "tensors": dict(kinds), "coverage": covered, "key": table.key}
        facts |= {"precision": precision, "ablation": dict(table.ablation)}
        print_json({"table": str(out), **facts})
        return
    for name, measured in table.precision.items():
        print_precision(name, measured)
    for name, drops in table.ablation.items():
        for change, drop_db in drops.items():
            OUT.print(f"{name}, {change}: {drop_db:.4f} dB")
    found = ", ".join(f"{count} of class {kind}" for kind, count in sorted(kinds.items()))
    OUT.print(
        f"{kinds.total()} tensors ({found}) on {table.images['samples']} samples of {table.images['name']}"
    )
    for o in table.coverage:
        density = "" if o.least is None else f", {o.least:.0%} to {o.most:.0%} of it"
        OUT.print(f"{o.decision} {o.name}: {o.taken} of {o.samples} samples{density}", soft_wrap=True)
    OUT.print(f"table: {out}", soft_wrap=True)
    if cache is not None:
        OUT.print(f"calibration cache: {cache}", soft_wrap=True)


def print_precision(program: str, measured: Precision) -> None:
    """Print what INT8 costs in each layer, those that cost most a multiply-add first, and the curve."""
    layers = Table(title=f"{program}: what INT8 costs", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "multiply-adds", "SQNR dB", "gain dB if float", ""):
        layers.add_column(column, overflow="fold", justify="left" if column in ("layer", "") else "right")
    for layer in measured.layers:
        kept = "float" if layer.layer in measured.kept else ""
        layers.add_row(
            layer.layer, f"{layer.share:.1%}", f"{layer.sqnr_db:.1f}", f"{layer.gain_db:.4f}", kept
        )
    curve = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("float layers", "INT8 share", "drop dB"):
        curve.add_column(column, justify="right")
    for point in measured.curve:
        curve.add_row(str(point.layers), f"{point.int8_share:.1%}", f"{point.drop_db:.4f}")
    OUT.print(layers, curve, sep="\n")
    OUT.print(
        f"chosen: {len(measured.kept)} layers float, {measured.drop_db:.4f} dB on fresh noise and crops"
    )
