"""A dry run of a network: each dynamic layer, its form on each target, its cost.

    generator    nodes that compute a layer's kernels, coefficients or mask, but not its input
    apply        the layer's primitive, with its own parameters
    static       the rest

Multiply-adds are per tile. A generator that several layers share counts for the first of them. A form is one
way to compute a primitive, built of ordinary operators or kept as a node; each target gets the first that it
can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops, targets
from edgedyn.conversion import contract
from edgedyn.conversion.blocks import block_rows
from edgedyn.conversion.capture import export, refine
from edgedyn.conversion.convert import load_target
from edgedyn.conversion.generated import generated_rows, sizes_of
from edgedyn.errors import EdgedynError
from edgedyn.graph.nodes import all_multiply_adds, module_path, sources
from edgedyn.graph.provenance import shared_provenance
from edgedyn.layers import RoutedModel, canonicalize, load_all, part_inputs, parts, recognise
from edgedyn.ops.masked_conv2d.unmask import unmask_blocks
from edgedyn.quantize.fold import fold
from edgedyn.recipe.factory import make_network
from edgedyn.recipe.networks import find_network
from edgedyn.recipe.recipe import Recipe, as_recipe

if TYPE_CHECKING:
    from torch.fx import Node

    from edgedyn.ops import Op


def inspect(
    network: Recipe | nn.Module | str | Path,
    *,
    shape: Sequence[int] = (1, 3, 256, 256),
    trust: bool = False,
) -> dict[str, Any]:
    """Inspect a recipe or a network without building it; nothing is written.

    Example:
        found = edgedyn.inspect("recipes/mallenet-s.phone.int8.yaml")
        print([layer["path"] for layer in found["layers"]])

    Args:
        network: a recipe or the path of one; ``package.module:function``, which returns a network; or a
            network.
        shape: (B, C, H, W) of a network's input; a recipe has its own.
        trust: allow a network from anywhere, and weights that are a pickle of tensors.

    Returns:
        As ``inspect_model``; of a recipe also ``recipe``, ``precision``, ``target`` and ``weights``, notes
        on the part of a checkpoint that was taken.

    Raises:
        EdgedynError: as ``pipeline.build`` for the recipe and the network.
    """
    if isinstance(network, str) and is_function(network):
        network = make_named(network, trust=trust)
    if isinstance(network, nn.Module):
        contract.refuse_other_inputs(network, ["--shape"], "the command")
        return inspect_model(network, (torch.zeros(tuple(shape)),))
    recipe = as_recipe(network)
    target = load_target(recipe)  # refuses as a build would
    model = contract.load_network(recipe, trust=trust).model
    inputs = tuple(torch.zeros(shape) for shape in recipe.input_shapes())
    inspected = inspect_model(model, inputs, chosen={recipe.target: recipe.forms}, instead=target)
    about = {"recipe": recipe.name, "target": recipe.target, "precision": recipe.precision}
    return {**about, "weights": list(getattr(model, "weights_notes", ())), **inspected}


def is_function(name: str) -> bool:
    """Return whether a name is ``package.module:function``, not the path of a recipe."""
    return ":" in name and Path(name).suffix not in (".yaml", ".yml")


def make_named(name: str, *, trust: bool = False) -> nn.Module:
    """Call ``package.module:function`` without arguments and return the network, in evaluation mode.

    Raises:
        RecipeError: when there is no such function, it is not trusted, or it needs arguments.
        ModelError: when it raises or exits, with the line of its code; when it returns no network.
    """
    return make_network(find_network(name, trust=trust), name, {}).eval()


@shared_provenance()
def inspect_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    chosen: Mapping[str, Mapping[str, str]] | None = None,
    instead: targets.Target | None = None,
) -> dict[str, Any]:
    """Inspect a network in evaluation mode.

    Args:
        model: with our dynamic layers, the authors', or none.
        inputs: example inputs; only the shapes count.
        chosen: target -> {op: form}, as a recipe's ``forms``.
        instead: used in place of the stock target with the same name, for instance one with our kernels.

    Returns:
        ``layers``, a dictionary per call of an op of ours, in order, after one for a routed network itself,
        and before those of the layers whose kernels are generated outside the five papers:
        ``path``, ``class``, ``paper``, ``primitive``, ``program``, ``forms`` {target: {"form", "why"}},
        ``generated`` {argument: shape}, ``kernel_bytes`` of these in float32, ``generator_macs``,
        ``apply_macs``, ``generator_parameters``, ``apply_parameters``;
        ``targets``: each target's preview of the float programs, as ``targets.Target.preview`` returns it, or
        ``missing`` or ``refused`` with a sentence;
        ``blocks`` and ``refused_blocks`` as ``blocks.block_rows``;
        and for the whole network ``shape``, ``parameters``, ``macs``, ``static_macs``,
        ``static_parameters``, ``generator_share``.

    Raises:
        ModelError: when a dynamic layer is not supported, or the network cannot be captured.
    """
    reference = recognise(model)
    canonical = canonicalize(reference)
    modules = dict(reference.named_modules(remove_duplicate=False))
    examples = part_inputs(canonical, inputs)
    exported = {name: export(part, examples[name]) for name, part in parts(canonical).items()}
    programs = {name: refine(program) for name, program in exported.items()}
    known = {name: targets.load(name) for name in targets.names()} | (
        {instead.name: instead} if instead else {}
    )
    layers = _routed_row(canonical, modules)
    macs = 0
    for name, program in programs.items():
        rows, total = _inspect_program(program, name, modules, known, chosen or {})
        others = generated_rows(exported[name], name, modules, known)
        layers, macs = layers + rows + others, macs + total
    applied, generated, own = (
        sum(row[key] for row in layers) for key in ("apply_macs", "generator_macs", "generator_parameters")
    )
    parameters = sum(p.numel() for p in reference.parameters())
    return {
        "shape": [list(x.shape) for x in inputs],
        "layers": layers,
        "targets": {name: _preview(target, programs, chosen or {}) for name, target in known.items()},
        **block_rows(programs),
        "parameters": parameters,
        "static_parameters": parameters - own - sum(row["apply_parameters"] for row in layers),
        "macs": macs,
        "static_macs": macs - applied - generated,
        "generator_share": generated / macs if macs else 0.0,
    }


def _routed_row(canonical: nn.Module, modules: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Return one row for a routed network, none for another."""
    if not isinstance(canonical, RoutedModel):
        return []
    kind, paper = _owner("", modules)
    rule = f"{canonical.rule} of {len(canonical.variants)} variants: {', '.join(canonical.variants)}"
    forms = {name: {"form": rule, "why": "the host routes on every target"} for name in targets.names()}
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
    chosen: Mapping[str, Mapping[str, str]],
) -> tuple[list[dict[str, Any]], int]:
    """Return one row for each call of an op of ours in a program, and all its multiply-adds."""
    ours = {op.overload: op for op in ops.load_all().values()}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    costs = all_multiply_adds(program.graph)
    sizes = sizes_of(program)
    claimed: set[Node] = set()
    rows = []
    for node in nodes:
        if node.target not in ours:
            continue
        op = ours[node.target]
        row, owned = _layer_row(node, op, costs, sizes, claimed)
        claimed |= owned
        module, paper = _owner(module_path(node), modules)
        forms = {name: _form_on(op, target, chosen.get(name, {})) for name, target in known.items()}
        rows.append({**row, "class": module, "paper": paper, "program": name, "forms": forms})
    return rows, sum(costs.values()) + sum(row["apply_macs"] for row in rows)


def _layer_row(
    node: Node, op: Op, costs: Mapping[Node, int], sizes: Mapping[Node, int], claimed: set[Node]
) -> tuple[dict[str, Any], set[Node]]:
    """Return the cost of one call of an op of ours, and the nodes that it owns.

    Args:
        node: the call.
        op: its primitive.
        costs: multiply-adds of the program's other nodes.
        sizes: number of values of the program's parameters.
        claimed: nodes that earlier calls own: a shared generator counts once.
    """
    arguments = dict(zip((a.name for a in op.overload._schema.arguments), node.args, strict=False))
    generated = {key: arguments[key] for key in op.generated if arguments.get(key) is not None}
    generator = sources(generated.values()) - sources([node.args[0]]) - claimed
    direct = {arg for arg in node.all_input_nodes if arg in sizes} - claimed - generator
    row = {
        "path": module_path(node),
        "primitive": op.name,
        "generator_macs": sum(costs.get(n, 0) for n in generator),
        "apply_macs": op.apply_macs(*(_value(arg) for arg in node.args)),
        "generator_parameters": sum(sizes.get(n, 0) for n in generator),
        "apply_parameters": sum(sizes[n] for n in direct),
        "generated": {key: list(_value(x).shape) for key, x in generated.items()},
        "kernel_bytes": sum(4 * _value(x).numel() for x in generated.values()),
    }
    return row, generator | direct


def _owner(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return class and paper of the reference layer at a path or around it."""
    papers = {cls: layer for layer in load_all().values() for cls in layer.canonical}
    around = path
    while type(modules.get(around)) not in papers:
        if not around:
            return type(modules.get(path)).__name__, "calls the op itself"
        around = around.rpartition(".")[0]
    kind = type(modules[around])
    return kind.__name__, papers[kind].paper


def _form_on(op: Op, target: targets.Target, chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the form that a target gets, and the reason."""
    try:
        form = ops.choose_form(op, target, chosen.get(op.name))
    except EdgedynError as error:
        return {"form": "", "why": str(error)}
    passed = [f for f in op.forms[: op.forms.index(form)] if not f.requires <= target.capabilities]
    if op.name in chosen:
        why = "the recipe names it"
    elif passed:
        why = "; ".join(f"{f.name} needs {', '.join(sorted(f.requires))}" for f in passed)
    else:
        why = "the first of its forms, needs " + (", ".join(sorted(form.requires)) or "ordinary operators")
    return {"form": form.name, "why": why}


def _preview(
    target: targets.Target,
    programs: Mapping[str, ExportedProgram],
    chosen: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Return a target's preview of the float programs, or its refusal."""
    if reason := target.missing():
        return {"missing": reason}
    try:
        decomposed = {}
        for name, program in programs.items():
            captured = unmask_blocks(program) if target.fuses_blocks else program
            forms = ops.choose_forms(captured, target, chosen.get(target.name, {}))
            done = ops.decompose(captured, forms, "before_quantize")
            if target.fuses_blocks:  # blocks have no BatchNorm inside
                done = torch.export.export(fold(done), *(done.example_inputs or ()))
            decomposed[name] = ops.decompose(done, forms, "after_quantize")
        return target.preview(decomposed)
    except EdgedynError as error:
        return {"refused": str(error)}


def _value(argument: Any) -> Any:
    """Return the shape-carrying value of a graph node, or a plain argument itself."""
    return argument.meta["val"] if hasattr(argument, "meta") else argument
