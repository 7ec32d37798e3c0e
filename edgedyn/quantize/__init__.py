"""From an expanded float program to the program that a target is given: folded, then INT8, half or float.

    fold -> equalize, observe, choose ranges, round weights (calibrate.py) -> Q/DQ pairs (convert.py)

Calibration is one step, and what it finds out is one value (``Calibrated``, the calibration table's part of a
program): given that, the same INT8 program is made without an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.quantize.accounting import KEPT_SHIFT, account, int8_share
from edgedyn.quantize.calibrate import (
    Calibrated,
    input_products_of,
    products_of,
    refuse_other_layers,
    restore,
    steps_of,
    without_products,
)
from edgedyn.quantize.input_products import drop_input_products, insert_input_products
from edgedyn.quantize.nodes import (
    COUNTED_OPS,
    MULTIPLY_ADD_OPS,
    belongs_to,
    fold,
    module_path,
    multiply_adds,
)
from edgedyn.quantize.plan import Plan, find_generators, make_plan, refuse_unknown_layers
from edgedyn.quantize.precision import Exam
from edgedyn.quantize.products import PRODUCT, insert_products
from edgedyn.quantize.shift import SHIFT, shift_zero_points
from edgedyn.quantize.trials import Trials, calibrate
from edgedyn.quantized_graph import halve, separate_readers
from edgedyn.targets import Int8Scheme

if TYPE_CHECKING:
    from edgedyn.recipe_sections import QuantizeSection

__all__ = [
    "COUNTED_OPS",
    "MULTIPLY_ADD_OPS",
    "Calibrated",
    "Exam",
    "Quantized",
    "find_generators",
    "fold",
    "int8_share",
    "module_path",
    "multiply_adds",
    "refuse_unknown_layers",
    "to_float",
    "to_int8",
]


@dataclass(frozen=True)
class Quantized:
    """A program ready for lowering, and what was done to it.

    Attributes:
        program: BatchNorm folded; INT8 as ``quantized_decomposed`` Q/DQ pairs, half, or float32.
        int8_mac_share: multiply-adds of convolutions and linear layers that run in INT8, as a share of all.
        multiply_add_nodes: how many there are.
        float_nodes: ``{"node", "count", "reason"}`` of what stays float.
        calibrated: what its INT8 steps and weights were made of; None for a float program.
        dynamic: layers that take the range of what they read from each image.
    """

    program: ExportedProgram
    int8_mac_share: float = 0.0
    multiply_add_nodes: int = 0
    float_nodes: tuple[dict[str, object], ...] = ()
    calibrated: Calibrated | None = field(default=None, repr=False)
    dynamic: tuple[str, ...] = ()


def to_float(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    precision: str,
    float32: Collection[str] = frozenset(),
) -> Quantized:
    """Return the folded program in float32 or float16; modules of the classes ``float32`` stay float32."""
    module = fold(program)
    if precision == "fp16":
        # a copy: the program shares its tensors with the module, and halving would change both
        module, inputs = copy.deepcopy(module), tuple(x.half() for x in inputs)
        halve(module, {node for node in module.graph.nodes if belongs_to(node, float32)})
    return Quantized(torch.export.export(module, inputs))


def to_int8(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    *,
    scheme: Int8Scheme,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]] = (),
    vivid: int = 0,
    finetuning: Sequence[tuple[Tensor, ...]] = (),
    sources: Sequence[str] = (),
    calibrated: Calibrated | None = None,
    float32: Collection[str] = frozenset(),
    kernels: Collection[Any] = frozenset(),
    generated: Collection[str] = frozenset(),
    exam: Exam | None = None,
    is_router: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Quantized:
    """Calibrate on the samples, unless what calibration found out is given, and convert to INT8.

    Args:
        program: expanded float program.
        inputs: one set of example inputs, for the shapes.
        scheme: how the target annotates INT8.
        section: the recipe's ``quantize`` section.
        samples: calibration inputs, each a tuple of tensors of the program's shapes.
        vivid: so many of the samples, the last ones, are only there for ranges to hold them.
        finetuning: inputs for training and judging weights; without any, the samples.
        sources: where each sample comes from, then each of ``finetuning``, for errors.
        calibrated: of the same program, from a calibration table; no sample is looked at.
        float32: names of module classes that are never quantized.
        kernels: overloads of our ops that the target computes in INT8 where x is.
        exam: what the cost of INT8 is measured on, layer by layer; with a limit, layers stay float for it.
        is_router: whether the program's first output is compared, so that what computes it stays float.
        generated: names of the tensors that are generated kernels, from ``find_generators``; a table says it.
        progress: called with (what is done, steps done, steps in all).

    Raises:
        CalibrationError: without samples and what calibration found out, or where that is of other layers.
        CheckFailedError: when the exam's limits leave no choice.
    """
    from edgedyn.quantize.convert import insert_steps

    # where layers have INT8 outputs, others read these, and have no bias to move them back
    is_shifted = section.shift and scheme.symmetric and not scheme.outputs
    if is_shifted:  # calibrated with zero points, which are gone in the end; kernels of ours read float then
        scheme, kernels = replace(scheme, symmetric=False), frozenset()
    if calibrated is not None:
        generated = {entry.name for entry in calibrated.entries if entry.kind == "kernel"}

    def plan(section: QuantizeSection, module: fx.GraphModule, kept: Sequence[str]) -> Plan:
        return make_plan(
            module,
            scheme=scheme,
            keep_float=section.keep_float,
            dynamic=section.dynamic,
            float32=float32,
            kernels=kernels,
            generated=generated if section.generated == "float" else (),
            kept=kept,
            is_router=is_router,
        )

    module = fold(program)
    if calibrated is None:
        trials = Trials(module, plan, scheme, samples, finetuning, sources, generated, progress, vivid)
        calibrated = calibrate(trials, section, exam)
    # from here on a table and a calibration are the same
    planned = plan(section, module, calibrated.kept)
    refuse_other_layers(module, planned.sites, calibrated)
    written = {site.y for site in planned.written(scheme)}
    final = without_products(calibrated, written)
    insert_products(module, products_of(final.entries))
    insert_input_products(module, input_products_of(final.entries))
    restore(module, final)
    chosen, steps = plan(section, module, final.kept), steps_of(final.entries, scheme)
    drop_input_products(module, {site.node for site in chosen.sites})
    reasons = {**chosen.reasons, **{n.name: n.meta[PRODUCT] for n in module.graph.nodes if PRODUCT in n.meta}}
    with torch.no_grad():
        converted = insert_steps(module, chosen, steps, scheme)
        if is_shifted:
            shift_zero_points(converted)
    reasons |= {node.name: KEPT_SHIFT for node in converted.graph.nodes if SHIFT in node.meta}
    separate_readers(converted)
    exported = torch.export.export(converted, inputs)
    ranged = tuple(site.name for site in chosen.sites if site.node in chosen.dynamic)
    return Quantized(exported, *int8_share(exported), account(converted, reasons), calibrated, ranged)
