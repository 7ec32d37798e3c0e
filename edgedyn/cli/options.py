"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedyn.cli.terminal import set_verbosity

RecipePath = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="YAML file, or a name of edgedyn list recipes."),
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory written by edgedyn build.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, for instance precision=fp32. May be repeated.",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace the existing output; use a calibration table even if its key does not fit.",
    ),
]
Replace = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the code of a network from anywhere; load weights from a pickle (.pth): tensors only.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of torch's random numbers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")]
Verbosity = Annotated[
    bool | None,
    typer.Option(
        "--verbose/--quiet",
        "-v/-q",
        callback=set_verbosity,
        show_default=False,
        help="-v: also the output of libraries, and tracebacks. -q: only result, warnings and errors.",
    ),
]
