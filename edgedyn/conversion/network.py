"""A recipe's network on our ops, captured and decomposed for its target: the steps before any precision.

    reference -> canonical -> captured -> decomposed

No image is read for them, unless statistics or capacities come from the calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops
from edgedyn.bundle.manifest import ROUTER
from edgedyn.conversion.capture import export, find_generated, refine
from edgedyn.conversion.contract import Loaded, example_inputs, load_network
from edgedyn.conversion.image_sets import draw, to_tensors
from edgedyn.conversion.reference import count_capacities, rewrite, settle
from edgedyn.conversion.unsupported import refuse_unsupported
from edgedyn.errors import CalibrationError, ModelError
from edgedyn.graph.blocks import find_blocks
from edgedyn.graph.nodes import module_path
from edgedyn.images.tasks import TASKS, predict_classes
from edgedyn.layers import RoutedModel, part_inputs, parts
from edgedyn.ops.inverted_residual import OP as BLOCK
from edgedyn.ops.masked_conv2d.unmask import unmask_blocks
from edgedyn.quantize.fold import fold
from edgedyn.quantize.progress import Progress, silent

if TYPE_CHECKING:
    from edgedyn.bundle.tensors import TensorSpec
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.images.sample import Sample
    from edgedyn.ops import Form, Op
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Target


@dataclass(frozen=True)
class Network:
    """A recipe's network on our ops, captured and decomposed.

    Attributes:
        recipe: with the scale of the network, where the recipe leaves it open.
        reference: the user's network.
        outputs: the tensors that the network returns.
        canonical: the network on our ops; a ``RoutedModel`` where it has variants.
        capacities: layer -> positions that the capacity variant evaluates; None without such a variant.
        inputs: program -> example inputs.
        captured: program -> the exported program, our ops as single nodes.
        decomposed: program -> the chosen form of each op, and the program in these forms.
        generated: paths of layers whose weight is computed from data, outside of our ops.
        drawn: samples of the calibration set.
        color_augmented: number of the last samples that only widen ranges.
    """

    recipe: Recipe
    reference: nn.Module
    outputs: tuple[TensorSpec, ...]
    canonical: nn.Module
    capacities: dict[str, int] | None
    inputs: dict[str, tuple[Tensor, ...]]
    captured: dict[str, ExportedProgram]
    decomposed: dict[str, tuple[dict[Op, Form], ExportedProgram]]
    generated: tuple[str, ...] = ()
    drawn: Sequence[Sample] = ()
    color_augmented: int = 0

    def __repr__(self) -> str:
        """Return one line: the network, its programs and the calibration samples."""
        programs = ", ".join(self.captured)
        return f"Network({type(self.reference).__name__}: {programs}; {len(self.drawn)} samples)"

    @property
    def natural(self) -> int:
        """Number of samples in natural colours."""
        return len(self.drawn) - self.color_augmented


def rewrite_network(
    recipe: Recipe, target: Target, *, trust: bool = False, progress: Progress = silent
) -> Network:
    """Rewrite the recipe's network on our ops, capture and decompose its programs; no image is read.

    Raises:
        EdgedynError: as ``contract.load_network``, ``capture`` and ``refuse_unsupported``.
        NoFormError: when an op of ours has no form that the target can run.
    """
    progress("rewrite layers", 0, 1)
    network = _rewrite(load_network(recipe, trust=trust), target, None)
    progress("rewrite layers", 1, 1)
    return network


def add_samples(
    network: Network, target: Target, calibration: CalibrationSet | None, progress: Progress = silent
) -> Network:
    """Draw the calibration samples of a network, and rewrite it again where its programs depend on them.

    BatchNorm statistics of a network without weights, and capacities, come from images.

    Raises:
        CalibrationError: when they are needed and the recipe names no set.
        EdgedynError: as ``rewrite_network``.
    """
    recipe = network.recipe
    if not (recipe.precision == "int8" or recipe.route.capacity is not None or not recipe.is_trained):
        return network
    drawn = draw(recipe, calibration) if calibration else []
    color_augmented = calibration.color_augmented if calibration and drawn else 0
    tensors = [to_tensors(sample) for sample in drawn[: len(drawn) - color_augmented]]
    settled = settle(recipe, network.reference, tensors)
    capacities = count_capacities(network.reference, tensors, recipe.route.capacity)
    if settled or capacities is not None:
        progress("rewrite layers", 0, 1)
        network = _rewrite(Loaded(recipe, network.reference, network.outputs), target, capacities)
        progress("rewrite layers", 1, 1)
    return replace(network, drawn=drawn, color_augmented=color_augmented)


def _rewrite(loaded: Loaded, target: Target, capacities: dict[str, int] | None) -> Network:
    recipe = loaded.recipe
    canonical = rewrite(loaded.model, capacities)
    _refuse_routed(canonical, loaded)
    inputs = part_inputs(canonical, example_inputs(recipe.input_specs()))
    exported = {name: export(module, inputs[name]) for name, module in parts(canonical).items()}
    generated = tuple(module_path(node) for p in exported.values() for node in find_generated(p))
    captured = {name: refine(program) for name, program in exported.items()}
    decomposed = {name: decompose_part(program, target, recipe) for name, program in captured.items()}
    refuse_unsupported(
        {name: ops.decompose(p, forms, "after_quantize") for name, (forms, p) in decomposed.items()}, target
    )
    return Network(
        recipe, loaded.model, loaded.outputs, canonical, capacities, inputs, captured, decomposed, generated
    )


def _refuse_routed(canonical: nn.Module, loaded: Loaded) -> None:
    """Refuse a routed network with several inputs or outputs: its rule passes one of each on."""
    counts = len(loaded.recipe.input_specs()), len(loaded.outputs)
    if isinstance(canonical, RoutedModel) and (max(counts) > 1 or loaded.model._forward_hooks):
        raise ModelError(
            f"{type(loaded.model).__name__} is a routed program with {counts[0]} inputs and {counts[1]} "
            "outputs; expected one input, and a plain tensor as output. Remove inputs: and outputs:, or "
            "route.capacity."
        )


def refuse_other_classes(network: Network, example: Sample) -> None:
    """Refuse class names of a set that are more or fewer than the network's logits.

    Raises:
        CalibrationError: with both numbers.
    """
    if TASKS[network.recipe.task].predictions is not predict_classes or not example.classes:
        return
    for name, program in network.captured.items():
        shape = next(iter(program.graph.output_node().args[0])).meta["val"].shape
        if name != ROUTER and shape[1] != len(example.classes):
            raise CalibrationError(
                f"the validation set names {len(example.classes)} classes, such as {example.classes[0]!r}, "
                f"and the network has {shape[1]} logits. List all classes in the order of the logits: "
                "classes: in the manifest (edgedyn calibrate --make-manifest FOLDER --set classes=FILE)."
            )


def decompose_part(
    captured: ExportedProgram, target: Target, recipe: Recipe
) -> tuple[dict[Op, Form], ExportedProgram]:
    """Choose the forms of one program, and decompose the ops whose form comes before quantization.

    Masked convolutions of a block that one kernel of the target computes become plain ones. Where there are
    such blocks, the forms name the op of that kernel: lowering makes its nodes.
    """
    captured = unmask_blocks(captured) if target.fuses_blocks else captured
    forms = ops.choose_forms(captured, target, recipe.forms)
    decomposed = ops.decompose(captured, forms, "before_quantize")
    if target.fuses_blocks and find_blocks(fold(decomposed))[0]:
        forms[BLOCK] = ops.choose_form(BLOCK, target)
    return forms, decomposed
