"""Calibrate and apply in one call, for tests of small networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from edgedyn import quantize
from edgedyn.quantize import Calibrated, CalibrationInputs, Int8Method


def quantize_program(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    *,
    scheme: Any,
    section: Any,
    samples: Sequence[tuple[Tensor, ...]] = (),
    color_augmented: int = 0,
    calibrated: Calibrated | None = None,
    float32: Collection[str] = frozenset(),
    kernels: Collection[Any] = frozenset(),
    is_router: bool = False,
    **calibration: Any,
) -> quantize.Quantized:
    """Return the INT8 program of a float one; arguments as of ``calibrate``, ``apply`` and their types."""
    method = Int8Method(scheme, section, float32, kernels, is_router)
    if calibrated is None:
        data = CalibrationInputs(samples, color_augmented)
        calibrated = quantize.calibrate(program, data, method, **calibration)
    return quantize.apply(program, inputs, calibrated, method)
