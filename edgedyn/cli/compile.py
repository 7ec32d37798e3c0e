"""``edgedyn compile``: the engines of a bundle, on the device that runs it."""

from __future__ import annotations

from typing import Annotated

import typer

from edgedyn.cli.options import AsJson, BundlePath, Replace, Verbosity
from edgedyn.cli.terminal import detail, print_json, progress_bars, result


def compile_engines(
    bundle: BundlePath,
    workspace_mb: Annotated[
        int,
        typer.Option("--workspace", metavar="MB", help="Most scratch memory per layer; 0: no limit."),
    ] = 0,
    force: Replace = False,
    as_json: AsJson = False,
    verbose: Verbosity = None,
) -> None:
    """On the Jetson: build a TensorRT engine beside each ONNX file of the bundle."""
    from edgedyn.device.compile import compile_bundle

    with progress_bars() as advance:
        facts = compile_bundle(
            bundle, workspace_bytes=workspace_mb * 2**20 or None, force=force, progress=advance
        )
    if as_json:
        print_json({"ok": True, "engines": {str(bundle / name): values for name, values in facts.items()}})
        return
    for name, values in facts.items():
        result(str(bundle / name))
        for fact, value in values.items():
            detail(f"  {fact:<20} {value}")
