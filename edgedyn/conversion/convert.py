"""From a recipe's network to the programs that a target lowers: the first half of the straight line.

    add_samples -> find_or_calibrate -> apply_precision

Each program of a routed network, its router and its variants, goes the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops, quantize, targets
from edgedyn.bundle.manifest import Routing
from edgedyn.conversion.calibration import NOTHING_MORE, Measurements, find_or_calibrate, int8_method
from edgedyn.conversion.image_sets import open_finetuning
from edgedyn.conversion.network import Network, add_samples, refuse_other_classes
from edgedyn.conversion.table_key import part_of
from edgedyn.errors import RecipeError, TargetMissingError
from edgedyn.layers import find_dynamic, float32_classes, recognise, routing_of
from edgedyn.quantize.progress import Progress, silent

if TYPE_CHECKING:
    from edgedyn.bundle.tensors import TensorSpec
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.images.sample import Sample
    from edgedyn.ops import Form, Op
    from edgedyn.quantize.table.table import CalibrationTable
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Target


@dataclass(frozen=True)
class Part:
    """One static program on its way to a target: the whole network, or a router, or a variant.

    Attributes:
        inputs: example inputs that it was captured with.
        forms: the form of each op of ours in it. A form is one way to compute an op, built of ordinary
            operators or kept as a node.
        decomposed: its exact rewrite in these forms.
        quantized: the decomposed program at the recipe's precision.
        program: the program for the target: ``quantized``, with the remaining ops of ours decomposed.
    """

    inputs: tuple[Tensor, ...]
    forms: dict[Op, Form]
    decomposed: ExportedProgram
    quantized: quantize.Quantized
    program: ExportedProgram

    def __repr__(self) -> str:
        """Return one line: the shapes of the inputs, and the form of each op."""
        shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
        forms = "".join(f", {op.name}: {form.name}" for op, form in self.forms.items())
        return f"Part({shapes}{forms})"


@dataclass(frozen=True)
class Converted:
    """A recipe's network after every step before lowering.

    Attributes:
        reference: the user's network.
        parts: by program name: ``forward`` alone, or router and variants of a routed network.
        routing: rule that chooses a variant; None where there is one program.
        capacities: layer -> positions that the capacity variant evaluates; None without such a variant.
        dynamic_layers: dotted paths; none in a static network, which deploys as well.
        table: the calibration; None for a float precision.
        mismatch: the first field of the table's key that does not fit the recipe, where ``force`` used the
            table all the same; else empty.
        outputs: the tensors that the programs return.
        network: the network that the parts were made of, with its calibration samples.
    """

    reference: nn.Module
    parts: dict[str, Part]
    routing: Routing | None
    capacities: dict[str, int] | None
    dynamic_layers: tuple[str, ...] = ()
    table: CalibrationTable | None = None
    mismatch: str = ""
    outputs: tuple[TensorSpec, ...] = ()
    network: Network | None = None

    def __repr__(self) -> str:
        """Return one line: programs, nodes of each, and the number of dynamic layers."""
        sizes = ", ".join(f"{n}: {len(p.program.graph.nodes)} nodes" for n, p in self.parts.items())
        return f"Converted({sizes}; {len(self.dynamic_layers)} dynamic layers)"

    @property
    def programs(self) -> dict[str, ExportedProgram]:
        """The programs for the target, by name."""
        return {name: part.program for name, part in self.parts.items()}

    @property
    def int8_shares(self) -> dict[str, tuple[float, int]]:
        """Share of multiply-adds in INT8, and number of layers with multiply-adds, by program."""
        parts = self.parts.items()
        return {name: (p.quantized.int8_mac_share, p.quantized.multiply_add_nodes) for name, p in parts}

    @property
    def forms(self) -> dict[Op, Form]:
        """The form of every op of ours."""
        return {op: form for part in self.parts.values() for op, form in part.forms.items()}


def convert(
    network: Network,
    target: Target,
    calibration: CalibrationSet | None,
    example: Sample,
    *,
    force: bool = False,
    measure: Measurements = NOTHING_MORE,
    progress: Progress = silent,
) -> Converted:
    """Bring a recipe's rewritten network to the programs that the target lowers.

    Nothing is written but the calibration table, where the recipe names one that does not exist.

    Args:
        network: from ``rewrite_network``; its recipe states precision and method.
        target: from ``load_target``.
        calibration: set for INT8 ranges, for BatchNorm statistics of a network without weights, and for
            capacities; None where none of them is needed.
        example: a sample of the validation set, for its names of classes.
        force: use the recipe's calibration table also where its key does not fit.
        measure: further measurements of a new calibration.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        CalibrationError: when the fine-tuning images are refused or shared with the validation set, the
            calibration table does not fit, or the samples do not cover the network's decisions.
        RecipeError: when a pattern of ``keep_float``, ``dynamic`` or ``coverage.unused`` matches nothing.
        CheckFailedError: when no choice of float layers meets ``max_drop_db``.
    """
    recipe = network.recipe
    finetuning = open_finetuning(recipe) if recipe.precision == "int8" else None
    refuse_other_classes(network, example)
    network = add_samples(network, target, calibration, progress)
    table, mismatch = find_or_calibrate(
        network, recipe, target, calibration, finetuning, force=force, measure=measure, progress=progress
    )
    finished = {name: apply_precision(network, name, recipe, target, table) for name in network.decomposed}
    known = [path for path, _, _ in find_dynamic(recognise(network.reference))]
    dynamic = tuple(path or "(the network)" for path in dict.fromkeys([*known, *network.generated]))
    routing = routing_of(network.canonical)
    return Converted(
        network.reference,
        finished,
        routing,
        network.capacities,
        dynamic,
        table,
        mismatch,
        network.outputs,
        network,
    )


def apply_precision(
    network: Network, name: str, recipe: Recipe, target: Target, table: CalibrationTable | None
) -> Part:
    """Bring one decomposed program to the recipe's precision, and decompose the remaining ops of ours."""
    inputs, (forms, decomposed) = network.inputs[name], network.decomposed[name]
    if table is None:
        quantized = quantize.to_float(decomposed, inputs, recipe.precision, float32_classes())
        program = ops.decompose(quantized.program, forms, "after_quantize")
        return Part(inputs, forms, decomposed, quantized, program)
    method = int8_method(network, name, recipe, target)
    quantized = quantize.apply(decomposed, inputs, part_of(table, name), method)
    program = ops.decompose(quantized.program, forms, "after_quantize")
    share, nodes = quantize.int8_share(program)  # again: forms decomposed just now bring float convolutions
    quantized = replace(quantized, int8_mac_share=share, multiply_add_nodes=nodes)
    return Part(inputs, forms, decomposed, quantized, program)


def load_target(recipe: Recipe, *, ablates: bool = False) -> Target:
    """Return the recipe's target; it can lower and run the recipe's precision here.

    Args:
        recipe: target, precision and method.
        ablates: whether the method's ablation follows, which also corrects biases.

    Raises:
        RecipeError: for an unknown target or a precision that it does not have.
        TargetMissingError: when its packages are not installed, or the recipe or the ablation corrects
            biases and NNCF is not installed.
    """
    target = targets.load(recipe.target, recipe.kernels, recipe.forms)
    if recipe.precision not in target.precisions:
        raise RecipeError(
            f"target {target.name!r} has no precision {recipe.precision!r}; it has "
            f"{', '.join(sorted(target.precisions))}. Change precision in the recipe."
        )
    if reason := target.missing():
        raise TargetMissingError(f"target {target.name!r} is not available here: {reason}")
    if recipe.precision == "int8":
        quantize.refuse_missing_tools(recipe.quantize, ablates=ablates)
    return target
