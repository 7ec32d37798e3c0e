"""``edgedyn inspect``: a dry run of a recipe or a network, by layer and by target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from edgedyn.cli.options import Set, Trust
from edgedyn.cli.terminal import OUT, AsJson, print_json
from edgedyn.errors import UsageError
from edgedyn.targets.quiet import quiet_libraries


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|MODULE:FUNCTION", help="a recipe, or a function giving a network")
    ],
    overrides: Set = None,
    shape: Annotated[str, typer.Option(help="B,C,H,W of the network's input; a recipe has its own")] = "",
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Dry run: each dynamic layer, its form on each target, what it costs; nothing is written."""
    with quiet_libraries():
        from edgedyn.conversion import inspection

        if Path(what).suffix in (".yaml", ".yml") or ":" not in what:
            from edgedyn.recipe.recipe import load_recipe

            found = inspection.inspect(load_recipe(Path(what), overrides or []), trust=trust)
        else:
            found = inspection.inspect_model(inspection.load_network(what), _zeros(shape or "1,3,256,256"))
    if as_json:
        print_json(found)
    else:
        _print_inspection(what, found)


def _zeros(shape: str) -> tuple[Any, ...]:
    """Return the one input of a shape ``B,C,H,W``."""
    import torch

    sizes = shape.split(",")
    if len(sizes) != 4 or not all(size.strip().isdigit() and int(size) for size in sizes):
        raise UsageError(f"--shape {shape!r}: expected four sizes from 1, for instance 1,3,256,256.")
    return (torch.zeros([int(size) for size in sizes]),)


def _print_inspection(what: str, found: dict[str, Any]) -> None:
    layers = len(found["layers"])
    OUT.print(f"{what}: {layers} dynamic layer{'' if layers == 1 else 's'}", style="bold", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "class", "primitive"):
        table.add_column(column, overflow="fold")
    # multiply-adds of generator and apply, parameters of both, bytes of what is generated
    for column in ("gen MMAC", "apply", "K par", "KB"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in found["layers"]:
        values = layer["generator_parameters"] + layer["apply_parameters"]
        table.add_row(
            layer["path"] or "(the network)",
            layer["class"],
            layer["primitive"],
            f"{layer['generator_macs'] / 1e6:.1f}",
            f"{layer['apply_macs'] / 1e6:.2f}",
            f"{values / 1e3:.1f}",
            f"{layer['kernel_bytes'] / 1024:.1f}",
        )
    if layers:
        OUT.print(table)
    for target, preview in found["targets"].items():
        OUT.print(f"\n{target}", style="bold")
        forms = {(x["primitive"], *x["forms"][target].values()) for x in found["layers"]}
        for primitive, form, why in sorted(forms):
            OUT.print(f"  {primitive}: {form or 'no form'} ({why})", soft_wrap=True)
        for problem in ("missing", "refused"):
            if problem in preview:
                OUT.print(f"  {problem}: {preview[problem]}", soft_wrap=True)
        if "delegated" in preview:
            OUT.print(f"  {preview['delegated']:.1%} of the operators delegated")
        for kind in ("portable", "unsupported"):
            if preview.get(kind):
                listed = ", ".join(f"{name} x {count}" for name, count in preview[kind].items())
                OUT.print(f"  {kind}: {listed}", soft_wrap=True)
    none = "no dynamic layer: it deploys like any static network. " if not found["layers"] else ""
    OUT.print(
        f"\n{none}{found['parameters']:,} parameters, {found['static_parameters']:,} "
        f"static; {found['macs'] / 1e6:,.1f} MMAC a tile of {found['shape'][0]}, "
        f"{found['generator_share']:.0%} of them generate kernels"
    )
