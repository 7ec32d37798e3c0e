"""Exactness of the rewrite: reference, canonical and decomposed network in float64, on real images.

reference -> canonical -> decomposed            max |difference| / max |output|
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from edgedyn import ops
from edgedyn.bundle.dispatch import Dispatcher, Run
from edgedyn.conversion.capture import export
from edgedyn.conversion.reference import rewrite
from edgedyn.errors import ModelError, quote
from edgedyn.graph.dtypes import InFloat64, float64_by_default, to_float64_like
from edgedyn.graph.rewrites import simplify
from edgedyn.images import metrics
from edgedyn.layers import parts
from edgedyn.report.rows import Row
from edgedyn.validation.checks import at_least_rounding
from edgedyn.validation.runs import Outputs, in_torch

if TYPE_CHECKING:
    from edgedyn.conversion.convert import Converted, Part
    from edgedyn.images.sample import Sample

_TINY = 1e-30  # an output that is zero everywhere has no relative error
_SAMPLES = 1  # float64 runs of whole networks; the rewrite does not depend on the image


def exactness_rows(
    converted: Converted, outputs: Outputs, *, precision: str, limit: float
) -> tuple[float, list[Row]]:
    """Prove the rewrite in float64, and measure the cost of float32 itself.

    Args:
        converted: the network and its decomposed programs.
        outputs: outputs of the decomposed programs, in float32.
        precision: precision of the recipe. At fp32 the rounding of float32 limits every row, so every sample
            is measured; the cost of other precisions is far larger, so one sample is enough.
        limit: largest max |difference| / max |output|.

    Returns:
        The relative rounding error of float32, and the rows; the first row holds this error.

    Raises:
        ModelError: when the network cannot run in float64.
    """
    reference = copy.deepcopy(converted.reference).double()
    canonical = rewrite(reference, converted.capacities)
    decomposed = {
        name: in_torch(_in_float64(converted.parts[name], module), torch.float64)
        for name, module in parts(canonical).items()
    }
    samples = outputs.samples if precision == "fp32" else outputs.samples[:_SAMPLES]
    try:
        exact = run_float64(in_torch(reference, torch.float64), samples)
    except Exception as error:  # the network's own, of any kind
        raise ModelError(
            f"{type(reference).__name__} runs in float32 and not in float64, in which edgedyn checks its "
            f"rewrite: {quote(error)}. Compare types with x.dtype, and make tensors of it."
        ) from error
    float32 = [y for ys in outputs.returned["decomposed"][: len(samples)] for y in ys]
    rounding = rounding_row(exact, float32)
    rewritten = rewrite_rows(
        exact[: _SAMPLES * len(converted.outputs)],
        in_torch(canonical, torch.float64),
        Dispatcher(decomposed, converted.routing),
        outputs.samples[:_SAMPLES],
        at_least_rounding(limit, rounding.value, np.float64),
    )
    return rounding.value, [rounding, *rewritten]


def _in_float64(part: Part, canonical: nn.Module) -> nn.Module:
    """Return a decomposed program in float64, with the tensors of its canonical network in float64.

    Constants that the program computed from these are computed again in float64: those of the program are
    rounded to float32, which is no error of the rewrite.
    """

    def decompose(program: ExportedProgram) -> ExportedProgram:
        return ops.decompose(program, part.forms, "after_quantize")

    program = decompose(part.decomposed)
    tensors = {**program.state_dict, **program.constants}
    names = {name for name, value in tensors.items() if value.is_floating_point()}
    if not names - canonical.state_dict().keys():
        return to_float64_like(program, canonical)
    # exported in float32: a network may name this type
    exported = export(copy.deepcopy(canonical).float(), part.inputs)
    module, inputs = to_float64_like(exported, canonical), tuple(x.double() for x in part.inputs)
    with float64_by_default():
        captured = simplify(torch.export.export(module, inputs))
    again = decompose(ops.decompose(captured, part.forms, "before_quantize")).module()
    return to_float64_like(program, again)


def rounding_row(exact: Sequence[np.ndarray], float32: Sequence[np.ndarray]) -> Row:
    """Measure the cost of float32 itself: the distance of a network's outputs from its own in float64.

    A deep network can amplify rounding (an untrained DDF-ResNet-101 by four orders of magnitude). Two correct
    programs then differ by up to twice this, so no comparison of two programs can demand less.
    """
    return Row("canonical:reference", "rounding[float32]", _max_relative(exact, float32), {}, len(exact))


def _max_relative(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    pairs = zip(expected, actual, strict=True)
    return max(metrics.max_abs(y, x) / max(float(np.abs(x).max()), _TINY) for x, y in pairs)


def rewrite_rows(
    exact: Sequence[np.ndarray],
    canonical: Run,
    decomposed: Callable[..., list[np.ndarray]],
    samples: Sequence[Sample],
    limit: float,
) -> list[Row]:
    """Compare reference, canonical and decomposed networks in float64 on real noisy images.

    Args:
        exact: outputs of the reference in float64, all of one sample after those of another.
        canonical: canonical network, made from the float64 reference. A rewrite that folds weights in float32
            would add the rounding of float32, which is no error of the rewrite.
        decomposed: the programs with the tensors of ``canonical``, see ``to_float64_like``.
        samples: noisy images.
        limit: largest max |difference| / max |output|.
    """
    rows, before = [], exact
    for between, program in (("canonical:reference", canonical), ("decomposed:canonical", decomposed)):
        after = run_float64(program, samples)
        error = _max_relative(before, after)
        rows.append(Row(between, "max_relative[float64]", error, {"at_most": limit}, len(samples)))
        before = after
    return rows


def run_float64(program: Callable[..., list[np.ndarray]], samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return every output of a float64 program for every sample."""
    with InFloat64():  # type: ignore[no-untyped-call]
        return [y for sample in samples for y in program(*(x.astype(np.float64) for x in sample.inputs))]
