"""From a recipe's network to the programs that a target lowers: the first half of the straight line.

    reference -> canonical -> captured -> decomposed -> quantized -> decomposed

A routed network goes the way once a part: its router, and each of its variants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops, quantize, targets
from edgedyn.bundle.manifest import FORWARD, ROUTER, Routing
from edgedyn.conversion.capture import capture
from edgedyn.conversion.coverage import cover
from edgedyn.conversion.evaluation_sets import make_evaluation_sets
from edgedyn.conversion.image_sets import draw, draw_more, open_finetuning, to_tensors
from edgedyn.conversion.reference import count_capacities, load_reference, rewrite
from edgedyn.conversion.table_key import find_table, make_table, part_of, table_key
from edgedyn.errors import RecipeError, TargetMissingError
from edgedyn.layers import find_dynamic, float32_classes, part_inputs, parts, recognise, routing_of
from edgedyn.quantize.progress import Progress, silent

if TYPE_CHECKING:
    from edgedyn.conversion.coverage import Coverage
    from edgedyn.images.image_set import CalibrationSet, Sample
    from edgedyn.ops import Form, Op
    from edgedyn.quantize.table.table import CalibrationTable
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Target


@dataclass(frozen=True)
class Part:
    """One static program on its way to a target: the whole network, or a router, or a variant.

    Attributes:
        inputs: what it was captured with.
        forms: how each op of ours in it is computed.
        decomposed: its exact rewrite in these forms.
        quantized: that at the recipe's precision.
        program: what the target lowers.
    """

    inputs: tuple[Tensor, ...]
    forms: dict[Op, Form]
    decomposed: ExportedProgram
    quantized: quantize.Quantized
    program: ExportedProgram


@dataclass(frozen=True)
class Converted:
    """A recipe's network after every step before lowering.

    Attributes:
        reference: the user's network.
        parts: by program name: ``forward`` alone, or the parts of a routed network.
        routing: how the variants are chosen between; None where there is one program.
        capacities: positions that the quick variant evaluates by layer; None where nothing is split so.
        dynamic_layers: dotted paths; none in a static network, which deploys as well.
        table: what calibration found out; None for a float precision.
        mismatch: what of the table's key does not fit the recipe, where it was used all the same.
    """

    reference: nn.Module
    parts: dict[str, Part]
    routing: Routing | None
    capacities: dict[str, int] | None
    dynamic_layers: tuple[str, ...] = ()
    table: CalibrationTable | None = None
    mismatch: str = ""

    @property
    def programs(self) -> dict[str, ExportedProgram]:
        """What the target lowers, by name."""
        return {name: part.program for name, part in self.parts.items()}

    @property
    def forms(self) -> dict[Op, Form]:
        """The form of every op of ours."""
        return {op: form for part in self.parts.values() for op, form in part.forms.items()}


@dataclass(frozen=True)
class Rewritten:
    """A recipe's network on our ops, captured and decomposed: all that does not depend on the precision.

    Attributes:
        reference: the user's network.
        canonical: the same on our ops; a ``RoutedModel`` where it has variants.
        capacities: positions that the quick variant evaluates by layer; None where nothing is split so.
        inputs: example inputs by program name.
        captured: programs with our ops as single nodes, by name.
        decomposed: the chosen forms and the program in these forms, by name.
        drawn: samples of the calibration set; the last ``color_augmented`` of them only widen ranges.
        color_augmented: number of these.
    """

    reference: nn.Module
    canonical: nn.Module
    capacities: dict[str, int] | None
    inputs: dict[str, tuple[Tensor, ...]]
    captured: dict[str, ExportedProgram]
    decomposed: dict[str, tuple[dict[Op, Form], ExportedProgram]]
    drawn: Sequence[Sample] = ()
    color_augmented: int = 0

    @property
    def natural(self) -> int:
        """Number of the samples that are images as they are."""
        return len(self.drawn) - self.color_augmented


@dataclass(frozen=True)
class Measurements:
    """Measurements that a calibration makes besides those that the recipe needs.

    Attributes:
        sensitivity: the cost of INT8 in each layer, also where the recipe sets no ``max_drop_db``.
        ablation: the worth of each switch of the method.
    """

    sensitivity: bool = False
    ablation: bool = False


def convert(
    recipe: Recipe,
    target: Target,
    calibration: CalibrationSet | None,
    example: Sample,
    *,
    force: bool = False,
    trust: bool = False,
    measure: Measurements = Measurements(),
    progress: Progress = silent,
) -> Converted:
    """Bring the recipe's network to the programs that the target lowers.

    Nothing is written but the calibration table, where the recipe names one that does not exist.

    Args:
        recipe: what to convert.
        target: where to, from ``load_target``.
        calibration: the set that INT8 observes, a network without weights takes its BatchNorm statistics
            from, and capacities are measured on; None where none of them is needed.
        example: an input of the recipe's shape, to export with.
        force: use the recipe's calibration table also where it is of something else.
        trust: allow weights that are a pickle of tensors.
        measure: measurements that calibration makes besides.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        CalibrationError: when images to fine-tune on are refused, or are validated on.
        RecipeError: when a pattern of ``keep_float`` matches no layer of any program.
    """
    finetuning = open_finetuning(recipe) if recipe.precision == "int8" else None  # refused before long work
    network = rewrite_network(recipe, target, calibration, example, trust=trust, progress=progress)
    table, mismatch = find_or_calibrate(
        network, recipe, target, calibration, finetuning, force=force, measure=measure, progress=progress
    )
    finished = {name: apply_precision(network, name, recipe, target, table) for name in network.decomposed}
    dynamic = tuple(path or "(the network)" for path, _, _ in find_dynamic(recognise(network.reference)))
    routing = routing_of(network.canonical)
    return Converted(network.reference, finished, routing, network.capacities, dynamic, table, mismatch)


def rewrite_network(
    recipe: Recipe,
    target: Target,
    calibration: CalibrationSet | None,
    example: Sample,
    *,
    trust: bool = False,
    progress: Progress = silent,
) -> Rewritten:
    """Rewrite the recipe's network on our ops, capture its programs and decompose them for the target.

    Every program is captured and decomposed before the first is calibrated: one that the target cannot run is
    refused at once. Arguments and errors as ``convert``.
    """
    progress("rewrite layers", 0, 1)
    needed = recipe.precision == "int8" or recipe.route.capacity is not None or not recipe.is_trained
    drawn = draw(recipe, calibration) if calibration and needed else []
    color_augmented = calibration.color_augmented if calibration and drawn else 0
    tensors = [to_tensors(sample) for sample in drawn[: len(drawn) - color_augmented]]
    reference = load_reference(recipe, tensors, trust=trust)
    capacities = count_capacities(reference, tensors, recipe.route.capacity)
    canonical = rewrite(reference, capacities)
    inputs = part_inputs(canonical, to_tensors(example))
    captured = {name: capture(module, inputs[name]) for name, module in parts(canonical).items()}
    decomposed = {name: decompose_part(program, target, recipe) for name, program in captured.items()}
    progress("rewrite layers", 1, 1)
    return Rewritten(reference, canonical, capacities, inputs, captured, decomposed, drawn, color_augmented)


def find_or_calibrate(
    network: Rewritten,
    recipe: Recipe,
    target: Target,
    images: CalibrationSet | None,
    finetuning: CalibrationSet | None = None,
    *,
    force: bool = False,
    measure: Measurements = Measurements(),
    progress: Progress = silent,
) -> tuple[CalibrationTable | None, str]:
    """Return the calibration table of a network: the recipe's where it fits, else a new one.

    Arguments and errors as ``convert``; ``finetuning`` is the set that weights are trained on, where the
    recipe names another one.

    Returns:
        The table, None for a float precision; and which fields of its key do not fit, where ``force`` took it
        all the same.
    """
    if recipe.precision != "int8" or images is None:
        return None, ""
    folded = {name: quantize.fold(program) for name, program in network.captured.items()}
    before = {name: (forms, quantize.fold(program)) for name, (forms, program) in network.decomposed.items()}
    modules = [module for _, module in before.values()]
    quantize.refuse_unknown_layers(modules, "keep_float", recipe.quantize.keep_float)
    quantize.refuse_unknown_layers(modules, "dynamic", recipe.quantize.dynamic)
    key = table_key(recipe, images, folded, before, finetuning)
    table, mismatch = find_table(recipe, key, force=force)
    if table is not None:
        return table, mismatch
    tensors = [part_inputs(network.canonical, to_tensors(sample)) for sample in network.drawn]
    natural = slice(network.natural)
    programs = {name: program for name, (_, program) in network.decomposed.items()}
    covered = cover(
        network.canonical, programs, tensors[natural], drawn=network.drawn[natural], recipe=recipe
    )
    inputs = _calibration_inputs(network, tensors, covered, recipe, finetuning or images)
    by_layer = measure.sensitivity or recipe.quantize.max_drop_db is not None
    evaluations = {}
    if by_layer or measure.ablation:
        evaluations = make_evaluation_sets(
            recipe, images, network.canonical, key, by_layer=by_layer, ablates=measure.ablation
        )
    found = {
        name: quantize.calibrate(
            program,
            inputs[name],
            int8_method(network, name, recipe, target),
            generated=quantize.find_generators(folded[name]),
            evaluation=evaluations.get(name),
            progress=_label(progress, name),
        )
        for name, program in programs.items()
    }
    return make_table(recipe, images, key, found, covered, finetuning), ""


def _calibration_inputs(
    network: Rewritten,
    tensors: Sequence[dict[str, tuple[Tensor, ...]]],
    covered: Coverage,
    recipe: Recipe,
    training: CalibrationSet,
) -> dict[str, quantize.CalibrationInputs]:
    """Return the inputs that each program is calibrated on, by its name.

    Args:
        network: it names the samples.
        tensors: inputs of every program, for each sample.
        covered: it chooses samples for each program.
        recipe: it asks for fine-tuning.
        training: the set that fine-tuning draws from.
    """
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
    return inputs


def int8_method(network: Rewritten, name: str, recipe: Recipe, target: Target) -> quantize.Int8Method:
    """Return how one program becomes INT8 on a target."""
    assert target.int8 is not None  # a target that lists int8 says how
    forms, _ = network.decomposed[name]
    kernels = {op.overload for op, form in forms.items() if form.fn is None}
    return quantize.Int8Method(target.int8, recipe.quantize, float32_classes(), kernels, name == ROUTER)


def apply_precision(
    network: Rewritten, name: str, recipe: Recipe, target: Target, table: CalibrationTable | None
) -> Part:
    """Bring one decomposed program to the recipe's precision, and decompose the ops that are left."""
    inputs, (forms, decomposed) = network.inputs[name], network.decomposed[name]
    if table is None:
        quantized = quantize.to_float(decomposed, inputs, recipe.precision, float32_classes())
        program = ops.decompose(quantized.program, forms, "after_quantize")
        return Part(inputs, forms, decomposed, quantized, program)
    method = int8_method(network, name, recipe, target)
    quantized = quantize.apply(decomposed, inputs, part_of(table, name), method)
    program = ops.decompose(quantized.program, forms, "after_quantize")
    share, nodes = quantize.int8_share(program)  # forms that are decomposed only now bring float convolutions
    quantized = replace(quantized, int8_mac_share=share, multiply_add_nodes=nodes)
    return Part(inputs, forms, decomposed, quantized, program)


def _label(progress: Progress, name: str) -> Progress:
    """Name the program that a step is of, where there are several."""
    return progress if name == FORWARD else lambda what, done, total: progress(f"{what} {name}", done, total)


def decompose_part(
    captured: ExportedProgram, target: Target, recipe: Recipe
) -> tuple[dict[Op, Form], ExportedProgram]:
    """Choose the forms of one program and decompose our ops."""
    forms = ops.choose_forms(captured, target, recipe.forms)
    return forms, ops.decompose(captured, forms, "before_quantize")


def load_target(recipe: Recipe) -> Target:
    """Return the recipe's target, able to lower and run the recipe's precision here.

    Raises:
        RecipeError: for an unknown target or a precision that it does not have.
        TargetMissingError: when its packages are not installed.
    """
    target = targets.load(recipe.target, recipe.kernels)
    if recipe.precision not in target.precisions:
        raise RecipeError(
            f"target {target.name!r} has no precision {recipe.precision!r}; it has "
            f"{', '.join(sorted(target.precisions))}. Change precision in the recipe."
        )
    if reason := target.missing():
        raise TargetMissingError(f"target {target.name!r} is not available here: {reason}")
    return target
