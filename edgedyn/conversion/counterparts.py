"""Counterparts of a build, lowered for their latency alone: in float32, and with the other kernels.

    float32          beside an INT8 build: the same kernels
    fused kernels    beside a build with kernels: stock, where a compiler is at hand
    stock kernels    beside a build with kernels: fused

INT8 takes its ranges from one calibration sample and rounds weights to nearest. No time depends on either;
the accuracy of these programs is not measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgedyn import ops, quantize
from edgedyn.bundle.manifest import FORWARD
from edgedyn.conversion.calibration import int8_method
from edgedyn.conversion.convert import load_target
from edgedyn.conversion.image_sets import to_tensors
from edgedyn.conversion.network import decompose_part
from edgedyn.errors import EdgedynError
from edgedyn.layers import float32_classes, part_inputs
from edgedyn.quantize.calibration import CalibrationInputs, Calibrator
from edgedyn.quantize.progress import Progress, silent

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgedyn.conversion.convert import Converted
    from edgedyn.conversion.network import Network
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Run, Target

# the parts of a method that cost time, change values and leave operators as they are
_QUICK = {"rounding": "nearest", "bias_correction": "none", "finetune": 0, "bn_reestimation": False}


def load_counterparts(
    converted: Converted, target: Target, folder: Path, progress: Progress = silent
) -> dict[str, Run]:
    """Lower and load the counterparts of a build; a counterpart that is refused is left out.

    Args:
        converted: the programs of the build.
        target: of its recipe.
        folder: existing folder for the lowered programs, which ``run`` needs.
        progress: called with (phase, steps done, steps of the phase).

    Returns:
        Name -> ``run(*arrays)``. None of a routed network, whose counterpart may take another variant; none
        on a target whose runtime here is not the device's.
    """
    network = converted.network
    if network is None or converted.routing is not None or target.profile is None:
        return {}
    loaded = {}
    for name, recipe in _other_recipes(network.recipe, target).items():
        progress(f"measure {name}", 0, 1)
        (folder / name).mkdir()
        try:
            run = _lower(network, converted, recipe, folder / name, progress)
        except EdgedynError:
            run = None
        progress(f"measure {name}", 1, 1)
        if run is not None:
            loaded[name] = run
    return loaded


def _other_recipes(recipe: Recipe, target: Target) -> dict[str, Recipe]:
    others = {}
    if recipe.precision == "int8":
        others["float32"] = recipe.model_copy(update={"precision": "fp32"})
    if target.load_kernels is not None:
        kernels = "stock" if recipe.kernels == "fused" else "fused"
        others[f"{kernels} kernels"] = recipe.model_copy(update={"kernels": kernels})
    return others


def _lower(
    network: Network, converted: Converted, recipe: Recipe, folder: Path, progress: Progress
) -> Run | None:
    """Return the loaded counterpart; None where other kernels leave the program as it is."""
    target = load_target(recipe)
    forms, decomposed = network.decomposed[FORWARD]
    if recipe.kernels != network.recipe.kernels:
        forms, decomposed = decompose_part(network.captured[FORWARD], target, recipe)
        if forms == converted.parts[FORWARD].forms:
            return None
        if recipe.kernels == "fused" and target.load_kernels is not None:
            progress("compile fused kernels", 0, 1)
            target.load_kernels()  # refuses before the calibration
            progress("compile fused kernels", 1, 1)
    inputs = network.inputs[FORWARD]
    if recipe.precision == "int8":
        network = replace(network, recipe=recipe, decomposed={FORWARD: (forms, decomposed)})
        quantized = _to_int8(network, converted, target)
    else:
        quantized = quantize.to_float(decomposed, inputs, recipe.precision, float32_classes()).program
    program = ops.decompose(quantized, forms, "after_quantize")
    artifact = target.lower({FORWARD: program}, folder, recipe.precision)
    return target.load(folder / artifact.programs[FORWARD], FORWARD)


def _to_int8(network: Network, converted: Converted, target: Target) -> ExportedProgram:
    """Return the INT8 program by ranges of one sample; layers that the build keeps in float stay so."""
    section = network.recipe.quantize.model_copy(update=_QUICK)
    method = replace(int8_method(network, FORWARD, network.recipe, target), section=section)
    sample = part_inputs(network.canonical, to_tensors(network.drawn[0]))[FORWARD]
    generated = quantize.find_generators(quantize.fold(network.captured[FORWARD]))
    _, decomposed = network.decomposed[FORWARD]
    module = quantize.fold(decomposed)
    calibrator = Calibrator(module, CalibrationInputs([sample]), method, generated)
    own = converted.parts[FORWARD].quantized.calibrated
    precision = own.precision if own is not None else None
    observed = calibrator.observe()
    calibrated = calibrator.round(*observed, precision.kept if precision else ()).calibrated
    calibrated = replace(calibrated, precision=precision)
    return quantize.apply(decomposed, network.inputs[FORWARD], calibrated, method).program
