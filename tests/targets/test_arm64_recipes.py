"""Every phone recipe on ARM64, emulated: its programs give the same results there as on x86.

Small images, because the emulator is slow, at float arithmetic above all. One small network of every system
is quick, and runs with every change; the networks as they are, with both kinds of kernels, are slow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from edgedyn import pipeline
from edgedyn.conversion.convert import load_target
from edgedyn.conversion.image_sets import to_tensors
from edgedyn.conversion.reference import rewrite
from edgedyn.layers import part_inputs, parts
from edgedyn.recipe.recipe import load_recipe
from edgedyn.targets.executorch import runner
from edgedyn.targets.executorch.run import load
from edgedyn.validation.runs import in_torch

pytestmark = [pytest.mark.arm64, pytest.mark.usefixtures("arm64")]
RECIPES = Path(__file__).parents[2] / "recipes"
WITHOUT_OPS = ("slimmable-dncnn", "slimmable-unet", "ffdnet-color", "dncnn-gray", "pmrid")
_MALLENET = ("network=small_networks:small_mallenet", "weights=null", "arguments={}")
_DYNCONV = ("arguments={colors: 3, blocks: 2}", "weights=null")
_ACDA = ("arguments={colors: 3, depth: 4}",)
# recipe, kernels -> changes that make its model small: one small network of every system
QUICK = {
    ("mallenet-s.phone.int8", "fused"): _MALLENET,
    ("acda-dncnn.phone.int8", "stock"): _ACDA,
    ("acda-dncnn.phone.int8", "fused"): _ACDA,
    ("acda-dncnn.phone.fp32", "stock"): _ACDA,
    ("ddf-denoiser.phone.int8", "fused"): ("arguments={colors: 3, blocks: 2}",),
    ("dynconv-denoiser.phone.int8", "fused"): _DYNCONV,
    ("slimmable-dncnn.phone.int8", "stock"): ("arguments={configurations: [[8, 8, 8], [8, 16, 8]]}",),
}
# no float operator of their INT8 programs gives other bits on another machine, but for layers kept in float
EXACT = ("acda-dncnn", "dynconv-denoiser", "dynconv-denoiser-capacity", "dynconv-resnet32", "slimmable-dncnn")


@dataclass(frozen=True)
class Outputs:
    """What one program of a recipe gives: the outputs of each way to run it, flat, one after the other."""

    is_int8: bool
    decomposed: np.ndarray
    quantized: np.ndarray
    exact: np.ndarray
    x86: np.ndarray
    arm64: np.ndarray


def flat(run: Callable[..., list[np.ndarray]], inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([y.ravel() for y in run(*inputs)])


def cases() -> list:
    """Return every phone recipe with each kind of kernels: the quick ones small, then all as they are."""
    found = [pytest.param(*key, QUICK[key], id="-".join(key)) for key in QUICK]
    for path in sorted(RECIPES.glob("*.phone.*.yaml")):
        name = path.name.removesuffix(".yaml")
        for kernels in ("stock",) if name.split(".")[0] in WITHOUT_OPS else ("stock", "fused"):
            whole = (name, kernels, ())
            found.append(pytest.param(*whole, marks=pytest.mark.slow, id=f"{name}-{kernels}-whole"))
    return found


def overrides(name: str, kernels: str, smaller: tuple[str, ...]) -> list[str]:
    side = 64 if "hourglass" in name else 32  # the hourglass halves its image six times
    colors = 4 if "pmrid" in name else 1 if "gray" in name else 3
    found = [f"kernels={kernels}", f"input.shape=[1, {colors}, {side}, {side}]", "tile.overlap=0"]
    found += [f"model.{change}" for change in smaller]
    if "joint" in name:
        found.append("guide.shape=[1, 3, 64, 64]")
    if "ffdnet" in name or "dncnn-gray" in name:
        found.append("model.weights=null")  # the authors' weights are not here
    if "weights=null" in smaller:  # its keys for single layers are of the trained network
        found += ["quantize.keep_float=[]", "quantize.dynamic=[]", "quantize.coverage.unused=[]"]
    return found


def run_all(name: str, kernels: str, smaller: tuple[str, ...], folder: Path) -> dict[str, Outputs]:
    """Convert and lower a recipe for a small image, and run its programs on a real one."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides(name, kernels, smaller))
    target = load_target(recipe)
    calibration, samples = pipeline.load_sets(recipe)
    network = pipeline.rewrite_network(recipe, target)
    made = pipeline.convert(network, target, calibration, samples[0])
    programs = target.lower(made.programs, folder, recipe.precision).programs
    wide = parts(rewrite(copy.deepcopy(made.reference).double(), made.capacities))
    tensors = part_inputs(rewrite(made.reference, made.capacities), to_tensors(samples[0]))
    inputs = {program: tuple(x.numpy() for x in given) for program, given in tensors.items()}
    emulated = runner.run_all([runner.Job(folder / programs[p], p, inputs[p]) for p in made.parts])
    return {
        program: Outputs(
            any("quantize_per_tensor" in str(node.target) for node in part.program.graph.nodes),
            flat(in_torch(part.decomposed.module(), torch.float32), inputs[program]),
            flat(in_torch(part.program.module(), torch.float32), inputs[program]),
            flat(in_torch(wide[program], torch.float64), inputs[program]),
            flat(load(folder / programs[program], program), inputs[program]),
            np.concatenate([y.ravel() for y in outputs]),
        )
        for (program, part), outputs in zip(made.parts.items(), emulated, strict=True)
    }


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error.astype(np.float64) ** 2)))


def assert_same_float(y: Outputs) -> None:
    """Both are float32: as far from the exact result, up to the order of their sums, as torch is."""
    rounding = max(rms(y.x86 - y.exact), rms(y.quantized - y.exact))
    assert rms(y.arm64 - y.exact) <= 2 * rounding + np.finfo(np.float32).eps * rms(y.exact)


def assert_same_int8(y: Outputs) -> None:
    """Ties between INT8 steps tip where a float operator before them rounds otherwise.

    Independent roundings of the same network differ by sqrt(2) of the error of INT8; most stay the same.
    """
    assert rms(y.arm64 - y.x86) <= math.sqrt(2) * rms(y.quantized - y.decomposed)


@pytest.mark.parametrize(("name", "kernels", "smaller"), cases())
def test_recipe_computes_on_arm64_what_it_computes_on_x86(name, kernels, smaller, tmp_path):
    keeps = load_recipe(RECIPES / f"{name}.yaml", overrides(name, kernels, smaller)).quantize.keep_float
    for program, y in run_all(name, kernels, smaller, tmp_path).items():
        assert y.arm64.shape == y.x86.shape
        assert len(np.unique(y.x86)) > min(10, y.x86.size // 2)
        if not y.is_int8:  # of a recipe in float32; a router may be so in any
            assert_same_float(y)
        elif name.split(".")[0] in EXACT and not keeps:
            assert np.array_equal(y.arm64, y.x86), program
        else:
            assert_same_int8(y)
