"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, see: edgedyn list recipes")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="directory made by edgedyn build")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe value, a.b=c")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="replace what stands at the output; use a calibration table of something else"
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="allow weights that are a pickle (tensors only)")]
Seed = Annotated[int, typer.Option("--seed", help="seed of torch's random numbers")]
