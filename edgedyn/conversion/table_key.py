"""The calibration table of a recipe: its key, its file, and its making.

    model       network, arguments, digest of the weights
    graph       operators and shapes of each program, our ops as single nodes
    forms       of our ops, where they add convolutions, and of the blocks that a kernel computes
    data        digest of the image set: files, noise, samples, seed
    transform   task, scale, shapes and values, which turn an image into an input
    method      the recipe's quantize section
    finetuning  digest of the fine-tuning images, where the recipe names a set for them
    versions    of the tools that calibrate

The target is no part of its key: one table holds quantization parameters for affine and symmetric runtimes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from edgedyn.bundle.tensors import TensorSpec, contract_keys
from edgedyn.graph.blocks import find_blocks
from edgedyn.graph.nodes import shape_of
from edgedyn.quantize import Calibrated
from edgedyn.quantize.plan import find_quantizable_layers
from edgedyn.quantize.table.table import CalibrationTable, read_table, refuse_place

if TYPE_CHECKING:
    from edgedyn.conversion.coverage import Coverage
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.ops import Form, Op
    from edgedyn.recipe.recipe import Recipe
_TOOLS = ("edgedyn", "torch", "torchao", "numpy")


def table_key(
    recipe: Recipe,
    images: CalibrationSet,
    captured: Mapping[str, fx.GraphModule],
    decomposed: Mapping[str, tuple[dict[Op, Form], fx.GraphModule]],
    finetuning: CalibrationSet | None = None,
    *,
    fuses_blocks: bool = False,
) -> dict[str, Any]:
    """Return the key of the table of a recipe's programs.

    Args:
        recipe: names model, task and method.
        images: the calibration set.
        captured: the programs with our ops as nodes, folded.
        decomposed: the forms of these ops, and the decomposed float programs, folded.
        finetuning: the fine-tuning set, where the recipe names one.
        fuses_blocks: whether a kernel computes the blocks of the programs, whose ranges are of other tensors.
    """
    layers = {name: _layers(program) for name, program in captured.items()}
    forms = {
        op.name: form.name
        for name, (chosen, program) in decomposed.items()
        if _layers(program) != layers[name]
        for op, form in chosen.items()
        if form.decompose == "before_quantize"
    }
    if fuses_blocks and any(find_blocks(program)[0] for _, program in decomposed.values()):
        forms["inverted_residual"] = "fused"
    model = {"network": recipe.model.network, "arguments": recipe.model.arguments}
    weights = recipe.weights_digest() or f"seed {recipe.model.seed}"
    more = {} if finetuning is None else {"finetuning": finetuning.digest()}
    return {
        "model": {**model, "weights": weights},
        "graph": {name: _graph(program) for name, program in captured.items()},
        "forms": forms,
        "data": images.digest(),
        "transform": {
            "task": recipe.task,
            "scale": recipe.sampling.scale,
            "shapes": [list(shape) for shape in recipe.input_shapes()],
            "values": [_values(spec) for spec in recipe.input_specs()],
        },
        "method": recipe.quantize.model_dump(
            exclude={"table", "samples", "color_augmented", "finetune_images"}
        ),
        **more,
        "versions": {name: version(name) for name in tools(recipe)},
    }


def tools(recipe: Recipe) -> tuple[str, ...]:
    """Return the packages whose versions influence a calibration; NNCF only where it corrects biases."""
    return _TOOLS if recipe.quantize.bias_correction == "none" else (*_TOOLS, "nncf")


def find_table(
    recipe: Recipe, key: Mapping[str, Any], *, force: bool = False
) -> tuple[CalibrationTable | None, str]:
    """Read the table that the recipe names, where its file exists.

    Args:
        recipe: ``quantize.table`` names the file.
        key: the key that the table must have.
        force: use it also where its key differs.

    Returns:
        The table or None, and the first field of its key that does not fit: empty unless forced.

    Raises:
        CalibrationError: when it is damaged, was edited, or has another key; the message names the field.
        UsageError: when its name does not end in .json, or its folder does not exist.
    """
    if recipe.quantize.table is None:
        return None, ""
    path = recipe.path(recipe.quantize.table)
    refuse_place(path)
    if not os.path.exists(path):
        return None, ""
    table = read_table(path)
    if not force:
        table.refuse_other(key, path)
    return table, table.mismatch(key)


def make_table(
    recipe: Recipe,
    images: CalibrationSet,
    key: Mapping[str, Any],
    programs: Mapping[str, Calibrated],
    covered: Coverage,
    finetuning: CalibrationSet | None = None,
) -> CalibrationTable:
    """Collect the calibrations of every program in one table; write it where the recipe names a file."""
    more = {} if finetuning is None else {"finetuning": _describe(finetuning)}
    table = CalibrationTable(
        key,
        _describe(images) | more,
        {name: (*calibrated.entries, *covered.logits.get(name, ())) for name, calibrated in programs.items()},
        {
            f"{name}/{x}": value
            for name, calibrated in programs.items()
            for x, value in calibrated.constants.items()
        },
        {name: c.precision for name, c in programs.items() if c.precision},
        {name: c.ablation for name, c in programs.items() if c.ablation},
        covered.outcomes,
    )
    if recipe.quantize.table is not None:
        table.write(recipe.path(recipe.quantize.table))
    return table


def _describe(images: CalibrationSet) -> dict[str, Any]:
    files = [{"name": path.name, "sha256": digest} for path, digest in images.files]
    counts = {"samples": images.samples, "color_augmented": images.color_augmented}
    return {"name": images.name, "licence": images.licence, **counts, "files": files}


def part_of(table: CalibrationTable, program: str) -> Calibrated:
    """Return the calibration of one program from a table."""
    prefix = f"{program}/"
    constants = {n.removeprefix(prefix): x for n, x in table.constants.items() if n.startswith(prefix)}
    precision, ablation = table.precision.get(program), table.ablation.get(program, {})
    return Calibrated(table.programs.get(program, ()), constants, precision, ablation)


def _values(spec: TensorSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.to_json().items() if key in contract_keys(spec.role)}


def _layers(module: fx.GraphModule) -> str:
    """Return the digest of the quantizable layers: names, input activations and shapes."""
    rows = [
        [layer.name, layer.input, list(shape_of(layer.node))] for layer in find_quantizable_layers(module)
    ]
    return _digest(rows)


def _graph(module: fx.GraphModule) -> str:
    """Return the digest of a program's operators, their arguments and shapes.

    Weights have a digest of their own. Nodes are numbered, because their names follow the source code.
    """
    numbers = {node: f"%{number}" for number, node in enumerate(module.graph.nodes)}
    rows = []
    for node in module.graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
        value = node.meta.get("val")
        shape = list(value.shape) if isinstance(value, Tensor) else None
        rows.append([node.op, "" if node.op == "get_attr" else str(node.target), repr(arguments), shape])
    return _digest(rows)


def _digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
