"""``edgedyn run``: image files through a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedyn.cli.options import AsJson, BundlePath, Replace, Verbosity
from edgedyn.cli.terminal import library_output, print_json, progress_bars, result, warn


def run(
    bundle: BundlePath,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG or TIFF files of any size.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the results.")],
    force: Replace = False,
    as_json: AsJson = False,
    verbose: Verbosity = None,
) -> None:
    """Run images of any size through a bundle, in tiles without seams."""
    from edgedyn.device import session

    with library_output(), progress_bars() as advance:
        opened = session.open_session(bundle)
        if not opened.bundle.ok:
            warn(f"checks of {bundle} failed when it was built; see its report.html")
        written = session.run(
            opened,
            images,
            out,
            force=force,
            progress=lambda image, done, total: advance(image.name, done, total),
        )
    if as_json:
        print_json({"ok": True, "files": [str(path) for path in written]})
    else:
        for path in written:
            result(str(path))
