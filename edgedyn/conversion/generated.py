"""Layers of a network whose weight is computed from data, outside of our ops: a row each for ``inspect``.

kernels mixed from constants     K static layers and the sum of their outputs, exact (``graph.mixes``)
any other kernels                the layer stays float
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from edgedyn.conversion.capture import find_generated
from edgedyn.graph.mixes import depending, find_mix
from edgedyn.graph.nodes import all_multiply_adds, argument, module_path, shape_of, sources

PAPER = "kernels generated outside the five papers"


def generated_rows(
    program: ExportedProgram, name: str, modules: Mapping[str, nn.Module], targets: Iterable[str]
) -> list[dict[str, Any]]:
    """Return one row for each such layer of an exported program, with the keys of ``inspect_model``.

    Args:
        program: from ``capture.export``, not simplified.
        name: of the program.
        modules: of the reference, by path.
        targets: names of the targets.
    """
    layers = find_generated(program)
    inputs = [n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    data, costs, sizes = depending(program.graph, inputs), all_multiply_adds(program.graph), sizes_of(program)
    rows = []
    for layer in layers:
        weight = argument(layer, 1)
        kernels = sum(math.prod(shape_of(node)) for node in find_mix(weight, data))
        generator = sources([weight]) - sources([argument(layer, 0)])
        path = module_path(layer)
        rows.append(
            {
                "path": path,
                "class": type(modules.get(path)).__name__,
                "paper": PAPER,
                "primitive": layer.target._schema.name.partition("::")[2],  # type: ignore[union-attr]
                "program": name,
                "forms": dict.fromkeys(targets, _form(kernels)),
                "generated": {"weight": list(shape_of(weight))},
                "kernel_bytes": 4 * math.prod(shape_of(weight)),
                "generator_macs": sum(costs.get(node, 0) for node in generator),
                "apply_macs": costs[layer] * max(kernels, 1),
                "generator_parameters": sum(sizes.get(node, 0) for node in generator),
                "apply_parameters": 0,
            }
        )
    return rows


def sizes_of(program: ExportedProgram) -> dict[Node, int]:
    """Return the number of values of each parameter of a program, buffers left out."""
    names = program.graph_signature.inputs_to_parameters
    return {
        node: node.meta["val"].numel()
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    }


def _form(kernels: int) -> dict[str, str]:
    if kernels:
        return {
            "form": f"{kernels} static layers, outputs mixed",
            "why": f"the weight is a linear mix of {kernels} constant kernels",
        }
    return {
        "form": "float layer",
        "why": "the weight is computed from the image, and is no mix of few constants",
    }
