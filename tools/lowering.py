"""Recipes lowered into a folder and loaded from it, without validation or bundle, for the measuring tools."""

from __future__ import annotations

import json
from pathlib import Path

from edgedyn import pipeline, targets
from edgedyn.bundle.dispatch import Dispatcher, load_programs
from edgedyn.bundle.manifest import ROUTER, Routing
from edgedyn.conversion.convert import load_target
from edgedyn.recipe.recipe import Recipe

INDEX = "programs.json"


def lower_recipe(recipe: Recipe, folder: Path, *, trust: bool = False) -> float:
    """Lower a recipe into a folder; return the smallest INT8 share of multiply-adds among its variants."""
    folder.mkdir(parents=True, exist_ok=True)
    target = load_target(recipe)
    network = pipeline.rewrite_network(recipe, target, trust=trust)
    calibration, samples = pipeline.load_sets(network.recipe)
    converted = pipeline.convert(network, target, calibration, samples[0])
    artifact = target.lower(converted.programs, folder, recipe.precision)
    routing = converted.routing
    index = {"target": recipe.target, "programs": artifact.programs}
    index["routing"] = routing.to_json() if routing else {}
    (folder / INDEX).write_text(json.dumps(index))
    return min(p.quantized.int8_mac_share for name, p in converted.parts.items() if name != ROUTER)


def load_lowered(folder: Path) -> Dispatcher:
    """Load the programs that ``lower_recipe`` wrote."""
    index = json.loads((folder / INDEX).read_text())
    target = targets.load(index["target"])
    return load_programs(target.load, folder, index["programs"], Routing.from_json(index["routing"]))
