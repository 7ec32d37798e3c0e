"""The calibration of a network: the recipe's table where it fits, else a new one from the calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgedyn import quantize
from edgedyn.bundle.manifest import FORWARD, ROUTER
from edgedyn.conversion.coverage import cover
from edgedyn.conversion.evaluation_sets import make_evaluation_sets
from edgedyn.conversion.image_sets import draw_more, to_tensors
from edgedyn.conversion.network import Network
from edgedyn.conversion.table_key import find_table, make_table, table_key
from edgedyn.layers import float32_classes, part_inputs
from edgedyn.quantize.progress import Progress, silent

if TYPE_CHECKING:
    from edgedyn.conversion.coverage import Coverage
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.quantize.table.table import CalibrationTable
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Target


@dataclass(frozen=True)
class Measurements:
    """Measurements that a calibration makes besides those that the recipe needs.

    Attributes:
        sensitivity: the cost of INT8 in each layer, also where the recipe sets no ``max_drop_db``.
        ablation: the worth of each switch of the method.
    """

    sensitivity: bool = False
    ablation: bool = False


NOTHING_MORE = Measurements()


def find_or_calibrate(
    network: Network,
    recipe: Recipe,
    target: Target,
    images: CalibrationSet | None,
    finetuning: CalibrationSet | None = None,
    *,
    force: bool = False,
    measure: Measurements = NOTHING_MORE,
    progress: Progress = silent,
) -> tuple[CalibrationTable | None, str]:
    """Return the calibration table of a network: the recipe's where it fits, else a new one.

    Args:
        network: to calibrate.
        recipe: names the table, and the method.
        target: where to.
        images: the calibration set.
        finetuning: set that weights are trained on, where the recipe names another one.
        force: use the recipe's table also where its key does not fit.
        measure: further measurements of a new calibration.
        progress: called with (phase, steps done, steps of the phase).

    Returns:
        The table, None for a float precision; and a description of the first field of its key that does not
        fit, empty unless ``force`` used it all the same.

    Raises:
        EdgedynError: as ``convert.convert``.
    """
    if recipe.precision != "int8" or images is None:
        return None, ""
    folded = {name: quantize.fold(program) for name, program in network.captured.items()}
    before = {name: (forms, quantize.fold(program)) for name, (forms, program) in network.decomposed.items()}
    modules = [module for _, module in before.values()]
    quantize.refuse_unknown_layers(modules, "keep_float", recipe.quantize.keep_float)
    quantize.refuse_unknown_layers(modules, "dynamic", recipe.quantize.dynamic)
    key = table_key(recipe, images, folded, before, finetuning, fuses_blocks=target.fuses_blocks)
    table, mismatch = find_table(recipe, key, force=force)
    if table is not None:
        return table, mismatch
    generators = {name: quantize.find_generators(module) for name, module in folded.items()}
    inputs, covered = _draw_inputs(network, recipe, finetuning or images)
    evaluations = _evaluation_sets(network, recipe, images, key, measure)
    calibrated = {
        name: quantize.calibrate(
            program,
            inputs[name],
            int8_method(network, name, recipe, target),
            generated=generators[name],
            evaluation=evaluations.get(name),
            progress=_label(progress, name),
        )
        for name, (_, program) in network.decomposed.items()
    }
    return make_table(recipe, images, key, calibrated, covered, finetuning), ""


def _draw_inputs(
    network: Network, recipe: Recipe, training: CalibrationSet
) -> tuple[dict[str, quantize.CalibrationInputs], Coverage]:
    """Return the inputs that each program is calibrated on, by its name, and the decisions that they cover.

    Args:
        network: has the calibration samples.
        recipe: coverage and fine-tuning.
        training: the set that fine-tuning draws from.
    """
    tensors = [part_inputs(network.canonical, to_tensors(sample)) for sample in network.drawn]
    natural = slice(network.natural)
    covered = cover(
        network.canonical,
        {name: program for name, (_, program) in network.decomposed.items()},
        tensors[natural],
        drawn=network.drawn[natural],
        section=recipe.quantize.coverage,
        is_trained=recipe.is_trained,
    )
    more = draw_more(recipe, training) if recipe.quantize.finetune else []
    trained = [part_inputs(network.canonical, to_tensors(sample)) for sample in more]
    inputs = {}
    for name in network.decomposed:
        chosen = [*covered.chosen[name], *range(network.natural, len(network.drawn))]
        inputs[name] = quantize.CalibrationInputs(
            [tensors[i][name] for i in chosen],
            network.color_augmented,
            [x[name] for x in trained],
            [sample.source for sample in (*(network.drawn[i] for i in chosen), *more)],
        )
    return inputs, covered


def _evaluation_sets(
    network: Network,
    recipe: Recipe,
    images: CalibrationSet,
    key: Mapping[str, Any],
    measure: Measurements,
) -> dict[str, quantize.EvaluationSet]:
    """Return the evaluation sets of the precision search and the ablation; none where neither runs."""
    by_layer = measure.sensitivity or recipe.quantize.max_drop_db is not None
    if not by_layer and not measure.ablation:
        return {}
    return make_evaluation_sets(
        recipe, images, network.canonical, key, by_layer=by_layer, ablates=measure.ablation
    )


def int8_method(network: Network, name: str, recipe: Recipe, target: Target) -> quantize.Int8Method:
    """Return the INT8 method of one program on a target."""
    assert target.int8 is not None  # a target that lists int8 has a scheme
    forms, _ = network.decomposed[name]
    kernels = {op.overload for op, form in forms.items() if form.fn is None}
    return quantize.Int8Method(target.int8, recipe.quantize, float32_classes(), kernels, name == ROUTER)


def _label(progress: Progress, name: str) -> Progress:
    """Add the program's name to each phase, where there are several programs."""
    if name == FORWARD:
        return progress
    return lambda phase, done, total: progress(f"{phase} {name}", done, total)
