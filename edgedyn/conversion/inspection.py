"""Look at a network without building it: each dynamic layer, its form on each target, what it costs.

    generator    what computes a layer's kernels, coefficients or mask, and not its input
    apply        the layer's primitive, with the parameters that it reads itself
    static       the rest

Multiply-adds are of one tile. What several layers' generators share is counted at the first.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops, targets
from edgedyn.conversion.capture import capture
from edgedyn.conversion.convert import load_target
from edgedyn.errors import EdgedynError, RecipeError
from edgedyn.graph.nodes import all_multiply_adds, module_path
from edgedyn.graph.provenance import shared_provenance
from edgedyn.layers import RoutedModel, canonicalize, load_all, part_inputs, parts, recognise

if TYPE_CHECKING:
    from torch.fx import Node

    from edgedyn.ops import Op
    from edgedyn.recipe.recipe import Recipe


def inspect(recipe: Recipe, *, trust: bool = False) -> dict[str, Any]:
    """Return what a build would do; nothing is written.

    Returns:
        As ``inspect_model``, with ``recipe``, ``precision`` and ``target``.

    Raises:
        EdgedynError: as ``pipeline.build`` would for the recipe and the network.
    """
    target = load_target(recipe)  # it refuses what a build would refuse
    model = recipe.load_model(trust=trust)
    inputs = tuple(torch.zeros(shape) for shape in recipe.input_shapes())
    found = inspect_model(model, inputs, wanted={recipe.target: recipe.forms}, instead=target)
    return {"recipe": recipe.name, "target": recipe.target, "precision": recipe.precision, **found}


def load_network(name: str) -> nn.Module:
    """Call ``package.module:function`` without arguments and return the network, in evaluation mode.

    Raises:
        RecipeError: when there is no such function, or it gives no network.
    """
    module_name, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise RecipeError(
            f"{name!r} cannot be called ({error}); expected package.module:function, importable from here, "
            "that returns a network without arguments."
        ) from error
    if not isinstance(made, nn.Module):
        raise RecipeError(f"{name!r} returns {type(made).__name__}; expected a torch.nn.Module.")
    return made.eval()


@shared_provenance()
def inspect_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    wanted: Mapping[str, Mapping[str, str]] | None = None,
    instead: targets.Target | None = None,
) -> dict[str, Any]:
    """Inspect a network in evaluation mode.

    Args:
        model: with our layers or the authors', or none.
        inputs: what a program of it would take; only the shapes count.
        wanted: target -> {op: form}, as a recipe's ``forms``.
        instead: taken for the target of its name, for instance one with our kernels.

    Returns:
        ``layers``, a dictionary for each call of an op of ours, in order, and for a routed network whole:
        ``path``, ``class``, ``paper``, ``primitive``, ``program``, ``forms`` {target: {"form", "why"}},
        ``generated`` {argument: shape}, ``kernel_bytes`` of these in float32, ``generator_macs``,
        ``apply_macs``, ``generator_parameters``, ``apply_parameters``;
        ``targets``: what each says of the float program (``targets.Preview``); and of the whole network
        ``shape``, ``parameters``, ``macs``, ``static_macs``, ``static_parameters``, ``generator_share``.

    Raises:
        ModelError: when a dynamic layer is not supported, or the network cannot be captured.
    """
    reference = recognise(model)
    canonical = canonicalize(reference)
    modules = dict(reference.named_modules(remove_duplicate=False))
    given = part_inputs(canonical, inputs)
    programs = {name: capture(part, given[name]) for name, part in parts(canonical).items()}
    known = {name: targets.load(name) for name in targets.names()} | (
        {instead.name: instead} if instead else {}
    )
    layers = _routed_row(canonical, modules)
    macs = 0
    for name, program in programs.items():
        rows, total = _inspect_program(program, name, modules, known, wanted or {})
        layers, macs = layers + rows, macs + total
    applied, generated, own = (
        sum(row[key] for row in layers) for key in ("apply_macs", "generator_macs", "generator_parameters")
    )
    parameters = sum(p.numel() for p in reference.parameters())
    return {
        "shape": [list(x.shape) for x in inputs],
        "layers": layers,
        "targets": {name: _preview(target, programs, wanted or {}) for name, target in known.items()},
        "parameters": parameters,
        "static_parameters": parameters - own - sum(row["apply_parameters"] for row in layers),
        "macs": macs,
        "static_macs": macs - applied - generated,
        "generator_share": generated / macs if macs else 0.0,
    }


def _routed_row(canonical: nn.Module, modules: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Describe a routed network by one row; none for another."""
    if not isinstance(canonical, RoutedModel):
        return []
    kind, paper = _owner("", modules)
    how = f"{canonical.rule} of {len(canonical.variants)} variants: {', '.join(canonical.variants)}"
    forms = {name: {"form": how, "why": "the host routes on every target"} for name in targets.names()}
    counts = ("generator_macs", "apply_macs", "generator_parameters", "apply_parameters", "kernel_bytes")
    return [
        {
            "path": "",
            "class": kind,
            "paper": paper,
            "primitive": "routed program",
            "program": "",
            "forms": forms,
            "generated": {},
            **dict.fromkeys(counts, 0),
        }
    ]


def _inspect_program(
    program: ExportedProgram,
    name: str,
    modules: Mapping[str, nn.Module],
    known: Mapping[str, targets.Target],
    wanted: Mapping[str, Mapping[str, str]],
) -> tuple[list[dict[str, Any]], int]:
    """Describe each call of an op of ours in a program; return also all its multiply-adds."""
    ours = {op.overload: op for op in ops.load_all().values()}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    costs = all_multiply_adds(program.graph)
    sizes = _parameter_sizes(program)
    claimed: set[Node] = set()
    rows = []
    for node in nodes:
        if node.target not in ours:
            continue
        op = ours[node.target]
        arguments = dict(zip((a.name for a in op.overload._schema.arguments), node.args, strict=False))
        made = {key: arguments[key] for key in op.generated if arguments.get(key) is not None}
        generator = _sources(made.values()) - _sources([node.args[0]]) - claimed
        direct = {arg for arg in node.all_input_nodes if arg in sizes} - claimed - generator
        claimed |= generator | direct
        module, paper = _owner(module_path(node), modules)
        rows.append(
            {
                "path": module_path(node),
                "class": module,
                "paper": paper,
                "primitive": op.name,
                "program": name,
                "forms": {target: _form_on(op, known[target], wanted.get(target, {})) for target in known},
                "generator_macs": sum(costs.get(n, 0) for n in generator),
                "apply_macs": op.apply_macs(*(_value(arg) for arg in node.args)),
                "generator_parameters": sum(sizes.get(n, 0) for n in generator),
                "apply_parameters": sum(sizes[n] for n in direct),
                "generated": {key: list(_value(x).shape) for key, x in made.items()},
                "kernel_bytes": sum(4 * _value(x).numel() for x in made.values()),
            }
        )
    return rows, sum(costs.values()) + sum(row["apply_macs"] for row in rows)


def _owner(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return class and paper of the reference layer that stands at a path or around it."""
    papers = {cls: layer for layer in load_all().values() for cls in layer.canonical}
    around = path
    while type(modules.get(around)) not in papers:
        if not around:
            return type(modules.get(path)).__name__, "calls the op itself"
        around = around.rpartition(".")[0]
    kind = type(modules[around])
    return kind.__name__, papers[kind].paper


def _form_on(op: Op, target: targets.Target, wanted: Mapping[str, str]) -> dict[str, str]:
    """Say which form a target gets, and why."""
    try:
        form = ops.choose_form(op, target, wanted.get(op.name))
    except EdgedynError as error:
        return {"form": "", "why": str(error)}
    passed = [f for f in op.forms[: op.forms.index(form)] if not f.requires <= target.capabilities]
    if op.name in wanted:
        why = "the recipe names it"
    elif passed:
        why = "; ".join(f"{f.name} needs {', '.join(sorted(f.requires))}" for f in passed)
    else:
        why = "the first of its forms, needs " + (", ".join(sorted(form.requires)) or "ordinary operators")
    return {"form": form.name, "why": why}


def _preview(
    target: targets.Target,
    programs: Mapping[str, ExportedProgram],
    wanted: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Ask a target what it would do with the float programs."""
    if reason := target.missing():
        return {"missing": reason}
    try:
        decomposed = {}
        for name, program in programs.items():
            forms = ops.choose_forms(program, target, wanted.get(target.name, {}))
            done = ops.decompose(program, forms, "before_quantize")
            decomposed[name] = ops.decompose(done, forms, "after_quantize")
        return target.preview(decomposed)
    except EdgedynError as error:
        return {"refused": str(error)}


def _parameter_sizes(program: ExportedProgram) -> dict[Node, int]:
    """Return the number of values of each parameter that a program reads, buffers left out."""
    names = program.graph_signature.inputs_to_parameters
    return {
        node: node.meta["val"].numel()
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    }


def _sources(values: Iterable[Any]) -> set[Node]:
    """Return the graph nodes that values are computed from, themselves included."""
    found: set[Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _value(argument: Any) -> Any:
    """Return the shape-carrying value of a graph node, or a plain argument itself."""
    return argument.meta["val"] if hasattr(argument, "meta") else argument
