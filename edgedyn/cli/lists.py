"""``edgedyn list``: the parts of edgedyn that a recipe can name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from edgedyn.cli.options import AsJson, Verbosity
from edgedyn.cli.tables import Column, print_results
from edgedyn.cli.terminal import print_json, result
from edgedyn.errors import UsageError, nearest


def list_layers() -> list[dict[str, Any]]:
    """List the papers' dynamic layers."""
    from edgedyn import layers

    return [
        {
            "layer": name,
            "paper": x.paper,
            "primitive": x.primitive,
            "classes": ", ".join(c.__name__ for c in x.canonical),
        }
        for name, x in layers.load_all().items()
    ]


def list_authors() -> list[dict[str, Any]]:
    """List the authors' classes that ``edgedyn.from_authors`` builds."""
    from edgedyn.checkpoints import authors

    return [{"class": name} for name in sorted(authors.load_all())]


def list_networks() -> list[dict[str, Any]]:
    """List the networks of ``edgedyn/models/``."""
    from edgedyn import models

    found = [(name, models.load(name)) for name in models.names()]
    parameters = {name: inspect.signature(made).parameters.values() for name, made in found}
    return [
        {"network": name, "arguments": ", ".join(_argument(p) for p in of)} for name, of in parameters.items()
    ]


def _argument(parameter: inspect.Parameter) -> str:
    """Return ``width=32``; a long default is left out."""
    value = repr(parameter.default)
    shown = parameter.default is not inspect.Parameter.empty and len(value) < 20
    return f"{parameter.name}={value}" if shown else parameter.name


def list_ops() -> list[dict[str, Any]]:
    """List the primitive ops with their forms."""
    from edgedyn import ops

    return [
        {
            "op": op.name,
            "form": f.name,
            "requires": ", ".join(sorted(f.requires)) or "nothing",
            "decompose": f.decompose,
        }
        for op in ops.load_all().values()
        for f in op.forms
    ]


def list_targets() -> list[dict[str, Any]]:
    """List the targets, and the missing packages of each."""
    from edgedyn import targets

    found = [targets.load(name) for name in targets.names()]
    return [
        {
            "target": t.name,
            "precisions": ", ".join(sorted(t.precisions)),
            "summary": t.summary,
            "missing": t.missing() or "",
        }
        for t in found
    ]


def list_metrics() -> list[dict[str, Any]]:
    """List the metrics."""
    from edgedyn.images.metrics import METRICS

    return [{"metric": n, "meaning": (f.__doc__ or "").strip().splitlines()[0]} for n, f in METRICS.items()]


def list_recipes() -> list[dict[str, Any]]:
    """List the shipped recipes; each command that takes a recipe takes these names."""
    from edgedyn.recipe.recipe import load_recipe
    from edgedyn.recipe.shipped import shipped_recipes

    recipes = {name: load_recipe(path) for name, path in shipped_recipes().items()}
    return [
        {"recipe": name, "network": r.model.network, "target": r.target, "precision": r.precision}
        for name, r in recipes.items()
    ]


def list_keys() -> list[dict[str, Any]]:
    """List every key of a recipe with type, default and meaning."""
    from edgedyn.recipe.describe import recipe_keys

    return [key.to_json() for key in recipe_keys()]


LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "layers": list_layers,
    "authors": list_authors,
    "ops": list_ops,
    "targets": list_targets,
    "networks": list_networks,
    "metrics": list_metrics,
    "recipes": list_recipes,
    "keys": list_keys,
}


_PROSE = {
    "paper",
    "classes",
    "arguments",
    "requires",
    "precisions",
    "summary",
    "missing",
    "meaning",
    "kind",
    "default",
}


def list_things(
    kind: Annotated[str, typer.Argument(metavar="|".join(LISTS), help="The kind of thing to list.")],
    as_json: AsJson = False,
    verbose: Verbosity = None,
) -> None:
    """List layers, authors' classes, ops, targets, networks, metrics, recipes or recipe keys."""
    if kind not in LISTS:
        raise UsageError(f"cannot list {kind!r}; {nearest(kind, LISTS)}expected one of {', '.join(LISTS)}.")
    rows = LISTS[kind]()
    if as_json:
        print_json(rows)
    elif rows:
        print_results(
            [Column(key, prose=key in _PROSE) for key in rows[0]],
            [[str(value) for value in row.values()] for row in rows],
        )
    else:
        result(f"no {kind}")
