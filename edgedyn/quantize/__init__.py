"""From a decomposed float program to the program that a target lowers.

    calibrate(program, samples) -> Calibrated    ranges, weights and float layers; part of a calibration table
    apply(program, calibrated) -> Quantized      the INT8 program; needs no image

A build from a calibration table and a build from images end in the same call of ``apply``, so that both give
the same program to the bit.
"""

from __future__ import annotations

from edgedyn.graph.nodes import COUNTED_OPS, MULTIPLY_ADD_OPS, module_path, multiply_adds
from edgedyn.quantize.accounting import int8_share
from edgedyn.quantize.calibrated import Calibrated
from edgedyn.quantize.calibration import CalibrationInputs, calibrate, refuse_missing_tools
from edgedyn.quantize.fold import fold
from edgedyn.quantize.plan import Int8Method, find_generators, refuse_unknown_layers
from edgedyn.quantize.quantized import Quantized, apply, to_float
from edgedyn.quantize.search.precision import EvaluationSet

__all__ = [
    "COUNTED_OPS",
    "MULTIPLY_ADD_OPS",
    "Calibrated",
    "CalibrationInputs",
    "EvaluationSet",
    "Int8Method",
    "Quantized",
    "apply",
    "calibrate",
    "find_generators",
    "fold",
    "int8_share",
    "module_path",
    "multiply_adds",
    "refuse_missing_tools",
    "refuse_unknown_layers",
    "to_float",
]
