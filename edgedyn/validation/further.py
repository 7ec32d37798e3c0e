"""The checks of a network's further outputs: each against float, since only the first one has a truth."""

from __future__ import annotations

import math
from dataclasses import replace

from edgedyn.images.tasks import Task
from edgedyn.report.rows import Row
from edgedyn.validation.applies import LOSSY, on
from edgedyn.validation.checks import FOLDING, INDEPENDENT, REORDERING, Check, float32_limit, rows
from edgedyn.validation.measurements import Case, cost_ratio, largest, largest_relative, mean_relative, sqnr

_QUANTIZED, _DEVICE = "quantized:decomposed", "device:quantized"


def further_rows(case: Case) -> list[Row]:
    """Return the rows of every output after the first; its name stands in brackets."""
    found = []
    for index, spec in enumerate(case.outputs.specs[1:], 1):
        task = Task(spec.meaning, has_truth=False)
        of = replace(case, outputs=case.outputs.of(index), shares={}, task=task)
        found += [replace(row, metric=f"{row.metric}[{spec.name}]") for row in rows(of, FURTHER)]
    return found


def _rms_ratio(case: Case) -> float:
    """Return the runtime's difference in units of the precision's cost; 0 where both are none."""
    ratio = cost_ratio("device", "quantized")(case)
    exact = math.isinf(ratio) and largest_relative("device", "quantized")(case) <= REORDERING
    return 0.0 if exact else ratio  # an output that no INT8 layer reaches costs nothing


FURTHER = (
    Check(
        _QUANTIZED, "max_abs", on("fp32"), largest_relative("quantized", "decomposed"), float32_limit(FOLDING)
    ),
    Check(
        _QUANTIZED,
        "sqnr_db",
        on(*LOSSY),
        sqnr("quantized", "decomposed"),
        lambda case: {"at_least": case.limits.sqnr_db},
    ),
    Check(
        _DEVICE, "mean_relative", on("fp32"), mean_relative("device", "quantized"), float32_limit(REORDERING)
    ),
    Check(_DEVICE, "mean_relative", on(*LOSSY), mean_relative("device", "quantized")),
    Check(_DEVICE, "max_abs", on("fp32", *LOSSY), largest("device", "quantized")),
    Check(_DEVICE, "rms_ratio", on("int8"), _rms_ratio, lambda case: {"at_most": INDEPENDENT}),
    Check("device:float", "sqnr_db", on("fp32", *LOSSY), sqnr("device", "decomposed")),
)
