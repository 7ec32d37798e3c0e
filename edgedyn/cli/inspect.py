"""``edgedyn inspect``: a dry run of a recipe or a network, by layer and by target."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from edgedyn.cli.options import AsJson, Set, Trust, Verbosity
from edgedyn.cli.tables import Column, print_details
from edgedyn.cli.terminal import detail, fold, library_output, print_json, result
from edgedyn.errors import UsageError, shown
from edgedyn.recipe.inputs import MAX_SIZE

_COLUMNS = (
    Column("layer"),
    Column("class"),
    Column("primitive"),
    # multiply-adds of generator and apply, parameters of both, bytes of the generated tensors
    *(Column(name, right=True) for name in ("gen MMAC", "apply", "K par", "KB")),
)


def inspect(
    network: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODULE:FUNCTION",
            help="A recipe, or a function without arguments that returns a network.",
        ),
    ],
    overrides: Set = None,
    shape: Annotated[
        str, typer.Option(metavar="B,C,H,W", help="Shape of the input of MODULE:FUNCTION.")
    ] = "1,3,256,256",
    as_json: AsJson = False,
    trust: Trust = False,
    verbose: Verbosity = None,
) -> None:
    """Dry run: each dynamic layer, its form per target, its cost. Writes nothing."""
    with library_output():
        from edgedyn.conversion import inspection
        from edgedyn.recipe.recipe import load_recipe

        if inspection.is_function(network):
            found = inspection.inspect(network, shape=parse_shape(shape), trust=trust)
        else:
            found = inspection.inspect(load_recipe(network, overrides or []), trust=trust)
    if as_json:
        print_json(found)
    else:
        _print_inspection(network, found)


def parse_shape(shape: str) -> list[int]:
    """Return the sizes of ``B,C,H,W``.

    Raises:
        UsageError: for another number of sizes, or one that is not from 1 to ``MAX_SIZE``.
    """
    is_shape = re.fullmatch(r" *[0-9]{1,9} *(, *[0-9]{1,9} *){3}", shape)
    sizes = [int(size) for size in shape.split(",")] if is_shape else []
    if not sizes or not all(1 <= size <= MAX_SIZE for size in sizes):
        raise UsageError(
            f"--shape {shown(shape)}: expected four sizes from 1 to {MAX_SIZE}, for instance 1,3,256,256."
        )
    return sizes


def _print_inspection(network: str, found: dict[str, Any]) -> None:
    layers = len(found["layers"])
    detail(f"{network}: {layers} dynamic layer{'' if layers == 1 else 's'}", style="bold")
    for note in found.get("weights", ()):
        detail(f"weights: {note}")
    if layers:
        print_details(_COLUMNS, [_cells(layer) for layer in found["layers"]])
        for paper in dict.fromkeys(layer["paper"] for layer in found["layers"]):
            paths = (x["path"] or "(the network)" for x in found["layers"] if x["paper"] == paper)
            _item(f"{paper}: {', '.join(dict.fromkeys(paths))}")
    _print_blocks(found["blocks"], found["refused_blocks"])
    for target, preview in found["targets"].items():
        detail()
        detail(target, style="bold")
        forms = {(x["primitive"], *x["forms"][target].values()) for x in found["layers"]}
        for primitive, form, why in sorted(forms):
            _item(f"{primitive}: {form or 'no form'} ({why})")
        for problem in ("missing", "refused"):
            if problem in preview:
                _item(f"{problem}: {preview[problem]}")
        if "delegated" in preview:
            _item(f"{preview['delegated']:.1%} of the operators delegated")
        for kind in ("portable", "unsupported"):
            if preview.get(kind):
                listed = ", ".join(f"{name} x {count}" for name, count in preview[kind].items())
                _item(f"{kind}: {listed}")
    detail()
    if not layers:
        result("no dynamic layer: it deploys like any static network")
    result(
        fold(
            f"{found['parameters']:,} parameters, {found['static_parameters']:,} static; "
            f"{found['macs'] / 1e6:,.1f} MMAC per tile of {found['shape'][0]}, "
            f"{found['generator_share']:.0%} of them generate kernels"
        )
    )


def _print_blocks(blocks: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    """Print the blocks that a fused kernel computes; equal refusals once, with the paths of all."""
    if not blocks and not refused:
        return
    detail()
    count = f"{len(blocks)} inverted-residual block{'' if len(blocks) == 1 else 's'}"
    detail(f"{count}: one kernel each with kernels: fused on a phone (docs/kernels.md)", style="bold")
    if blocks:
        _item(", ".join(dict.fromkeys(row["path"] or row["layers"][1] for row in blocks)))
    reasons: dict[str, list[str]] = {}
    for row in refused:
        reasons.setdefault(row["reason"], []).append(row["path"])
    for reason, paths in reasons.items():
        _item(f"no block: {', '.join(dict.fromkeys(paths))}: {reason}")


def _item(text: str) -> None:
    detail(fold(f"  {text}", indent="    "))


def _cells(layer: dict[str, Any]) -> tuple[str, ...]:
    values = layer["generator_parameters"] + layer["apply_parameters"]
    return (
        layer["path"] or "(the network)",
        layer["class"],
        layer["primitive"],
        f"{layer['generator_macs'] / 1e6:.1f}",
        f"{layer['apply_macs'] / 1e6:.2f}",
        f"{values / 1e3:.1f}",
        f"{layer['kernel_bytes'] / 1024:.1f}",
    )
