"""``edgedyn calibrate --make-manifest``: the manifest of a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgedyn.cli.terminal import detail, print_json, progress_bars, result

ManifestOf = Annotated[
    Path | None,
    typer.Option(
        "--make-manifest",
        metavar="FOLDER",
        help="Write the set manifest of a folder of images instead; --set gives keys of the manifest: "
        "licence=CC0, noise.kind=real, short_side=256.",
    ),
]
Beside = Annotated[
    Path | None,
    typer.Option(
        "--clean",
        "--labels",
        metavar="PATH",
        help="With --make-manifest: a folder with the clean photo of each noisy one, or a CSV file of "
        "file,class.",
    ),
]


def write_manifest(
    folder: Path, out: Path, beside: Path | None, overrides: list[str], *, force: bool, as_json: bool
) -> None:
    """Write the manifest of a folder, and print its counts."""
    from edgedyn.images.draft import make_manifest
    from edgedyn.recipe.recipe import apply_override

    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    with progress_bars() as advance:
        made = make_manifest(folder, out, beside=beside, values=values, force=force, progress=advance)
    counts = {
        "files": len(made.files),
        "clean": sum(file.clean is not None for file in made.files),
        "labels": sum(file.label is not None for file in made.files),
        "classes": len(made.classes),
        "samples": made.drawn,
    }
    if as_json:
        print_json({"ok": True, "manifest": str(out), **counts, "noise": made.noise.to_json()})
        return
    detail(", ".join(f"{count} {name}" for name, count in counts.items() if count))
    detail(f"noise {made.noise.to_json()}, licence {made.licence}; other values: --set noise.kind=none")
    result(f"manifest: {out}")
