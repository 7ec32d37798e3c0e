"""``edgedyn init``: a commented recipe for a network of the user's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedyn.cli.inspect import parse_shape
from edgedyn.cli.options import AsJson, Replace, Trust, Verbosity
from edgedyn.cli.terminal import detail, library_output, print_json, result, warn
from edgedyn.errors import ModelError, UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

_TRUE_PICTURES = ("denoise",)  # tasks whose sets add noise to clean photos


def init(
    network: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="A function without arguments that returns your network."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="The recipe; by default <function>.<target>.<precision>.yaml."
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="Runtime: executorch, tensorrt or onnxruntime.")] = "executorch",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "int8",
    shape: Annotated[str, typer.Option(metavar="B,C,H,W", help="Shape of the input.")] = "1,3,256,256",
    force: Replace = False,
    trust: Trust = False,
    as_json: AsJson = False,
    verbose: Verbosity = None,
) -> None:
    """Write a commented recipe for a network of yours; layers, task and outputs are read from it."""
    with library_output():
        from edgedyn import targets
        from edgedyn.conversion import inspection
        from edgedyn.files import replace_file
        from edgedyn.recipe.draft import draft_recipe

        if precision not in (known := sorted(targets.load(target).precisions)):
            raise UsageError(
                f"target {target!r} has no precision {precision!r}; {nearest(precision, known)}it has "
                f"{', '.join(known)}. Pick one with --precision."
            )
        sizes = parse_shape(shape)
        if not inspection.is_function(network):
            raise UsageError(f"got {network!r}; expected package.module:function, for instance mynet:make.")
        place = out or Path(f"{network.partition(':')[2]}.{target}.{precision}.yaml")
        if os.path.exists(place) and not force:
            raise UsageError(f"{place} exists already. Choose another file with -o, or pass --force.")
        model = inspection.make_named(network, trust=trust)
        found = inspection.inspect(model, shape=sizes)
        task, outputs = guess_task(model, sizes)
        values = _values(network, target, precision, sizes, task, place)
        values |= {"outputs": outputs} if outputs else {}
        text = draft_recipe(values, _notes(network, target, precision, found))
        replace_file(place, text.encode())
    preview = found["targets"][target]
    for problem in ("missing", "refused"):
        if problem in preview:
            warn(f"target {target}: {preview[problem]}")
    if as_json:
        print_json({"ok": True, "recipe": str(place), "task": task, "layers": found["layers"]})
        return
    result(str(place))
    detail(f"{len(found['layers'])} dynamic layers, task {task}")
    detail(f"Set model.weights in it, then: edgedyn build {place} -o out")


def guess_task(model: nn.Module, shape: list[int]) -> tuple[str, list[str]]:
    """Return the task that the shape of a network's output fits, and the name of that output among several.

    Raises:
        ModelError: if no output is a tensor of a shape that fits a task.
    """
    import torch

    from edgedyn.conversion.contract import flatten

    with torch.no_grad():
        leaves = dict(flatten(model(torch.zeros(shape))))
    tensors = {name: list(leaf.shape) for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    b, c, h, w = shape
    fits: list[tuple[str, Callable[[list[int]], bool]]] = [
        ("denoise", lambda found: found == shape),
        ("upscale", lambda found: len(found) == 4 and found == [b, c, found[2] // h * h, found[2] // h * w]),
        ("classify", lambda found: len(found) == 2),
        ("keypoints", lambda found: len(found) == 4),
    ]
    for task, is_it in fits:
        for name, found in tensors.items():
            if is_it(found):
                return task, [name] if len(tensors) > 1 else []
    raise ModelError(
        f"the network returns {list(tensors.values()) or 'no tensor'} for an input of {shape}; expected an "
        "image of the same size (denoise) or a multiple of it (upscale), logits (classify), or heatmaps "
        "(keypoints). Wrap it in such a network."
    )


def _values(
    network: str, target: str, precision: str, shape: list[int], task: str, place: Path
) -> dict[str, Any]:
    """Return the keys that the recipe sets."""
    name = "skimage" if task in _TRUE_PICTURES else "skimage-clean"
    overlap = {"tile.overlap": min(shape[2:]) // 4} if min(shape[2:]) <= 32 else {}
    return {
        "name": place.stem,
        "model.network": network,
        "task": task,
        "input.shape": shape,
        "target": target,
        "precision": precision,
        "calibration": _image_set(f"{name}.yaml", place),
        "validation": _image_set(f"{name}-validation.yaml", place),
        **overlap,
    }


def _image_set(name: str, place: Path) -> str:
    """Return the path of a shipped image set for a recipe at ``place``: relative in a checkout."""
    from edgedyn.recipe.shipped import shipped_folder

    own = Path("calib", name)
    if own.is_file():
        return Path(os.path.relpath(own, place.parent)).as_posix()
    return (shipped_folder().parent / own).as_posix()


def _notes(network: str, target: str, precision: str, found: dict[str, Any]) -> list[str]:
    """Return the sentences at the top of the recipe."""
    notes = [
        f"{network} on {target} in {precision}. Written by edgedyn init.",
        "Remove the # in front of a key to set it. Paths start at the folder of this file.",
        "calibration and validation name photos of skimage; name your own where yours look different.",
    ]
    for layer in found["layers"]:
        form = layer["forms"][target]["form"] or "no form"
        path = layer["path"] or "(the network)"
        notes.append(f"Dynamic layer {path}: {layer['class']}, {layer['primitive']} as {form}.")
    return (
        notes
        if found["layers"]
        else [*notes, "The network has no dynamic layer: it deploys as a static one."]
    )
