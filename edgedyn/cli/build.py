"""``edgedyn build``: a bundle and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedyn.cli.options import Force, RecipePath, Seed, Set, Trust
from edgedyn.cli.terminal import ERR, OUT, AsJson, exit_unless, print_json, print_rows, progress_bars
from edgedyn.targets.quiet import quiet_libraries


def build(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="the bundle's directory")],
    overrides: Set = None,
    as_json: AsJson = False,
    force: Force = False,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Build a bundle and its report; exit 1 if a check fails."""
    from edgedyn.recipe.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    with quiet_libraries(), progress_bars() as advance:
        import torch

        from edgedyn import pipeline

        torch.manual_seed(seed)
        built = pipeline.build(parsed, out, force=force, trust=trust, progress=advance)
    mismatch = built.bundle.manifest["facts"].get("calibration", {}).get("forced")
    if mismatch:
        ERR.print(f"warning: by --force: the calibration table {mismatch}", style="yellow", soft_wrap=True)
    if as_json:
        print_json(built.to_json())
    else:
        print_rows(list(built.report.rows))
        latency = built.latency_ms
        OUT.print(
            f"\n{'ok' if built.report.ok else 'FAILED'}: {out}  "
            f"({built.bundle.precision}, {built.bundle.target})"
        )
        OUT.print(
            f"one tile on this machine: {latency['median']:.1f} ms median of {latency['runs']:.0f} runs"
        )
        if not built.bundle.manifest["facts"]["dynamic_layers"]:
            OUT.print("the network has no dynamic layer: it was deployed as a static one")
        if not parsed.is_trained:
            OUT.print("no trained weights: picture and decisions are reported, not judged")
        OUT.print(f"report: {out / 'report.html'}", soft_wrap=True)
    exit_unless(built.report.ok)
