"""From a decomposed float program to the program that a target lowers: INT8, float16 or float32.

fold -> rescale Muls -> calibrated weights -> Q/DQ pairs -> shifted zero points
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgedyn.graph.dtypes import to_float16
from edgedyn.graph.nodes import belongs_to
from edgedyn.quantize.accounting import KEPT_SHIFT, account, int8_share
from edgedyn.quantize.calibrated import (
    Calibrated,
    qparams_of,
    refuse_other_layers,
    rescale_factors,
    restore,
    without_rescales,
)
from edgedyn.quantize.fold import fold
from edgedyn.quantize.plan import Int8Method, blocks_of
from edgedyn.quantize.rescale.input_rescale import drop_input_rescales, insert_input_rescales
from edgedyn.quantize.rescale.output_rescale import RESCALE, insert_output_rescales
from edgedyn.quantize.rescale.shift import SHIFT, shift_zero_points


@dataclass(frozen=True)
class Quantized:
    """A program ready for lowering, with the account of its precision.

    Attributes:
        program: BatchNorm folded; INT8 as ``quantized_decomposed`` Q/DQ pairs, float16, or float32.
        int8_mac_share: multiply-adds of convolutions and linear layers that run in INT8, as a share of all.
        multiply_add_nodes: number of these layers.
        float_nodes: ``{"node", "count", "reason"}`` of operators that stay float.
        calibrated: origin of the INT8 parameters and weights; None for a float program.
        dynamic: layers whose input range is taken from each image.
    """

    program: ExportedProgram
    int8_mac_share: float = 0.0
    multiply_add_nodes: int = 0
    float_nodes: tuple[dict[str, object], ...] = ()
    calibrated: Calibrated | None = None
    dynamic: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line with counts; the values are in the fields."""
        count = sum(int(str(row["count"])) for row in self.float_nodes)
        return (
            f"Quantized({self.int8_mac_share:.1%} INT8 multiply-adds, {self.multiply_add_nodes} layers, "
            f"{count} float operators)"
        )


def to_float(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    precision: str,
    float32: Collection[str] = frozenset(),
) -> Quantized:
    """Return the folded program in float32 or float16; modules of the classes ``float32`` stay float32."""
    module = fold(program)
    if precision == "fp16":
        # a copy: the program shares its tensors with the module, and to_float16 would change both
        module, inputs = copy.deepcopy(module), tuple(x.half() for x in inputs)
        to_float16(module, {node for node in module.graph.nodes if belongs_to(node, float32)})
    return Quantized(torch.export.export(module, inputs))


def apply(
    program: ExportedProgram, inputs: tuple[Tensor, ...], calibrated: Calibrated, method: Int8Method
) -> Quantized:
    """Convert a decomposed float program to INT8 by its calibration; no image is needed.

    Args:
        program: decomposed float program; left as it is.
        inputs: one set of example inputs, for the shapes.
        calibrated: calibration of this program, from ``calibrate`` or from a calibration table.
        method: the recipe's ``quantize`` section on a target.

    Raises:
        CalibrationError: when the calibration is of other layers.
    """
    from edgedyn.quantize.convert import insert_qdq

    scheme = method.ranges
    generated = {entry.name for entry in calibrated.entries if entry.kind == "kernel"}
    module = fold(program)
    plan = method.plan(module, kept=calibrated.kept, generated=generated)
    refuse_other_layers(module, plan.layers, calibrated)
    final = without_rescales(calibrated, {layer.output for layer in plan.quantized_outputs(scheme)})
    factors = rescale_factors(final.entries)
    insert_output_rescales(module, factors)
    insert_input_rescales(module, factors)
    restore(module, final)
    # again: a Mul in front of a layer renames its input
    plan = method.plan(module, kept=final.kept, generated=generated)
    drop_input_rescales(module, {layer.node for layer in plan.layers})
    reasons = {**plan.reasons, **{n.name: n.meta[RESCALE] for n in module.graph.nodes if RESCALE in n.meta}}
    with torch.no_grad():
        converted = insert_qdq(module, plan, qparams_of(final.entries, scheme), scheme)
        if method.shifts:
            shift_zero_points(converted)
    reasons |= {node.name: KEPT_SHIFT for node in converted.graph.nodes if SHIFT in node.meta}
    exported = torch.export.export(converted, inputs)
    dynamic = tuple(layer.name for layer in plan.layers if layer.node in plan.dynamic)
    int8_blocks = [block for block in blocks_of(converted, scheme) if block.qparams is not None]
    inside = {node for block in int8_blocks for node in block.nodes}
    accounted = account(converted, reasons, inside)
    return Quantized(exported, *int8_share(exported), accounted, calibrated, dynamic)
