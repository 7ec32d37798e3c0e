"""``edgedyn build``: a bundle and its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedyn.cli.options import AsJson, Force, RecipePath, Seed, Set, Trust, Verbosity
from edgedyn.cli.tables import print_rows
from edgedyn.cli.terminal import (
    detail,
    exit_unless,
    fold,
    library_output,
    print_json,
    progress_bars,
    result,
    warn,
)
from edgedyn.report.beside import describe_beside

if TYPE_CHECKING:
    from edgedyn.pipeline import Build


def build(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Directory of the bundle.")],
    overrides: Set = None,
    as_json: AsJson = False,
    force: Force = False,
    trust: Trust = False,
    seed: Seed = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare",
            help="On a phone, also time the network in float32 and with the other kernels; up to three times "
            "the time of lowering.",
        ),
    ] = True,
    verbose: Verbosity = None,
) -> None:
    """Build a bundle and its report; exit 1 if a check fails."""
    from edgedyn.recipe.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    with library_output(), progress_bars() as advance:
        import torch

        from edgedyn import pipeline

        torch.manual_seed(seed)
        built = pipeline.build(parsed, out, force=force, trust=trust, compare=compare, progress=advance)
    mismatch = built.bundle.manifest["facts"].get("calibration", {}).get("forced")
    if mismatch:
        warn(f"by --force: the calibration table {mismatch}")
    if as_json:
        print_json(built.to_json())
    else:
        _print_build(built, is_trained=parsed.is_trained)
    exit_unless(built.report.ok)


def _print_build(built: Build, *, is_trained: bool) -> None:
    bundle, latency = built.bundle, built.latency_ms
    print_rows(built.report.rows)
    detail()
    result(f"{'ok' if built.report.ok else 'FAILED'}: {bundle.path}  ({bundle.precision}, {bundle.target})")
    for item in built.advice:
        detail(fold(f"{item['row']}: {item['advice']}"))
    for name, note in bundle.manifest["facts"].get("notes", {}).items():
        detail(fold(f"note: {name}: {note}"))
    place = bundle.manifest["facts"].get("measured_on", {})
    detail(
        fold(
            f"one tile on this machine: {latency['median']:.1f} ms median of {latency['runs']:.0f} runs, "
            + ", ".join(place[key] for key in ("tile", "runtime", "threads", "machine") if key in place)
        )
    )
    if not bundle.manifest["facts"]["dynamic_layers"]:
        detail("The network has no dynamic layer; it was deployed as a static one.")
    weights = str(bundle.manifest["facts"]["weights"])
    if is_trained and ";" in weights:  # a part of the checkpoint was chosen
        detail(f"weights {weights}")
    if not is_trained:
        detail("The network has no trained weights; picture and decisions are reported without limits.")
    detail(f"report: {bundle.path / 'report.html'}")
    for name, sentence in describe_beside(latency, built.latency_beside).items():
        detail(f"{name}: {sentence}")
