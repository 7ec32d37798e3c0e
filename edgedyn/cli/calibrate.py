"""``edgedyn calibrate``: the table alone, the cost of INT8 by layer and by switch; a set manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedyn.cli.options import AsJson, Replace, Set, Trust, Verbosity
from edgedyn.cli.set_manifest import Beside, ManifestOf, write_manifest
from edgedyn.cli.tables import Column, print_details
from edgedyn.cli.terminal import detail, fold, library_output, print_json, progress_bars, result
from edgedyn.errors import UsageError

if TYPE_CHECKING:
    from edgedyn.quantize.table.entries import Precision
    from edgedyn.quantize.table.table import CalibrationTable


Recipe = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE", help="YAML file, or a name of edgedyn list recipes."),
]
Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="FILE", help="The table, a new JSON file; or the set manifest."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Also write float ONNX and a calibration cache, for TensorRT up to 10 without Q/DQ.",
    ),
]
Sensitivity = Annotated[
    bool,
    typer.Option(
        "--sensitivity", help="Measure the cost of INT8 in each layer; resumes after an interruption."
    ),
]
Ablation = Annotated[
    bool,
    typer.Option("--ablation", help="Measure INT8 with each switch of the method set the other way."),
]


def calibrate(
    out: Out,
    recipe: Recipe = None,
    cache: Cache = None,
    overrides: Set = None,
    as_json: AsJson = False,
    force: Replace = False,
    trust: Trust = False,
    sensitivity: Sensitivity = False,
    ablation: Ablation = False,
    manifest_of: ManifestOf = None,
    beside: Beside = None,
    verbose: Verbosity = None,
) -> None:
    """Write only the calibration table, which builds reuse where quantize.table names it.

    With --make-manifest FOLDER it writes the set manifest of a folder of images, and takes no recipe.
    """
    from edgedyn.recipe.recipe import load_recipe

    if recipe is None and manifest_of is not None:
        write_manifest(manifest_of, out, beside, overrides or [], force=force, as_json=as_json)
        return
    if recipe is None or manifest_of is not None or beside is not None:
        raise UsageError(
            "expected a RECIPE for a calibration table, or --make-manifest FOLDER, with --clean or --labels "
            "if need be, for a set manifest. Run: edgedyn calibrate -h"
        )
    parsed = load_recipe(recipe, overrides or [])
    with library_output(), progress_bars() as advance:
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
    if as_json:
        print_json(_to_json(table, out))
    else:
        _print_table(table, out)
        if cache is not None:
            result(f"calibration cache: {cache}")


def _kinds(table: CalibrationTable) -> Counter[str]:
    """Count the tensors of a table by class."""
    return Counter(entry.kind for entries in table.programs.values() for entry in entries)


def _to_json(table: CalibrationTable, out: Path) -> dict[str, Any]:
    covered = [asdict(outcome) for outcome in table.coverage]
    precision = {name: measured.to_json() for name, measured in table.precision.items()}
    return {
        "table": str(out),
        "images": table.images,
        "tensors": dict(_kinds(table)),
        "coverage": covered,
        "key": table.key,
        "precision": precision,
        "ablation": dict(table.ablation),
    }


def _print_table(table: CalibrationTable, out: Path) -> None:
    for name, measured in table.precision.items():
        print_precision(name, measured)
    for name, drops in table.ablation.items():
        for change, drop_db in drops.items():
            detail(f"{name}, {change}: {drop_db:.4f} dB")
    kinds = _kinds(table)
    counts = ", ".join(f"{count} of class {kind}" for kind, count in sorted(kinds.items()))
    samples, name = table.images["samples"], table.images["name"]
    detail(fold(f"{kinds.total()} tensors ({counts}) on {samples} samples of {name}"))
    for o in table.coverage:
        density = "" if o.least is None else f", {o.least:.0%} to {o.most:.0%} of it"
        detail(f"{o.decision} {o.name}: {o.taken} of {o.samples} samples{density}")
    result(f"table: {out}")


_LAYERS = (
    Column("layer"),
    *(Column(name, right=True) for name in ("multiply-adds", "SQNR dB", "gain dB if float")),
    Column(""),
)
_CURVE = tuple(Column(name, right=True) for name in ("float layers", "INT8 share", "drop dB"))


def print_precision(program: str, measured: Precision) -> None:
    """Print the cost of INT8 per layer, the highest cost per multiply-add first, and the curve."""
    layers = [
        (
            layer.layer,
            f"{layer.share:.1%}",
            f"{layer.sqnr_db:.1f}",
            f"{layer.gain_db:.4f}",
            "float" if layer.layer in measured.kept else "",
        )
        for layer in measured.layers
    ]
    curve = [
        (str(point.layers), f"{point.int8_share:.1%}", f"{point.drop_db:.4f}") for point in measured.curve
    ]
    print_details(_LAYERS, layers, title=f"{program}: cost of INT8")
    detail()
    print_details(_CURVE, curve)
    detail(f"chosen: {len(measured.kept)} layers float, {measured.drop_db:.4f} dB on fresh noise and crops")
