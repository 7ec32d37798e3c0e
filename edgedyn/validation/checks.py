"""The checks of a build after the rewrite: each program against the one before it, and against the truth.

    decomposed -> quantized -> device            float : truth, device : truth

``CHECKS`` is the table: between, metric, applies, measure, limit. ``exactness.py`` checks the rewrite itself,
``decisions.py`` masks and gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgedyn.bundle.manifest import ROUTER
from edgedyn.images.tasks import Task
from edgedyn.report.rows import Row
from edgedyn.validation.applies import (
    LOSSY,
    labelled,
    no_truth,
    on,
    other_picture,
    picture,
    predicts,
    residual,
    truth,
)
from edgedyn.validation.measurements import (
    Case,
    Measure,
    accuracy,
    accuracy_drop,
    agreement,
    at_worst_tile,
    by_condition,
    by_program,
    cost_ratio,
    count_layers,
    count_predictions,
    count_samples,
    int8_share,
    largest,
    largest_relative,
    largest_tile_rms,
    mean_drop,
    mean_levels,
    mean_relative,
    psnr,
    psnr_of_input,
    residual_sqnr,
    sqnr,
    ssim,
    where_more_than_five,
    whole,
    worst_drop,
    worst_tile,
)

if TYPE_CHECKING:
    from edgedyn.recipe.keys import LimitSection

Limit = dict[str, float]

# Folding BatchNorm changes one float32 rounding per layer: far below the limit, 1/16 of an 8-bit level.
FOLDING = 1 / 255 / 16
# float32 programs that add in another order: 1e-4 is about 1700 roundings of 2**-24, all in one direction.
REORDERING = 1e-4
# Two independent roundings of one rms differ by sqrt(2) times that rms; more is another computation.
INDEPENDENT = math.sqrt(2)
# The runtime's own INT8 noise in units of the program's: about 1 where it computes the same, 0 where it
# computes in float; half and double tell these apart.
SAME_NOISE = {"at_least": 0.5, "at_most": 2.0}
# Each of two correct programs has the rounding error of float32, so they differ by up to twice that error.
# Where the error is 1 % of the output or more, a comparison proves nothing, and the limit grows no further.
BOTH_PROGRAMS = 2
PROVABLE = 0.01

# metrics of the cost of deployment; not exactness, not the runtime's arithmetic
_QUALITY = (
    "psnr_db",
    "psnr_drop_db",
    "residual_sqnr_db",
    "sqnr_db",
    "prediction_agreement",
    "top1_drop",
    "top5_drop",
    "mask_flip_rate",
    "gate_agreement",
    "largest_flipped_margin",
    "largest_flipped_gate_margin",
)


@dataclass(frozen=True)
class Check:
    """One measurement with its limit.

    Attributes:
        between: the two things compared, ``device:quantized``.
        metric: name with its unit.
        applies: whether it is made, by precision and task.
        measure: the value.
        limit: ``at_least``, ``at_most``, both, or none where the value is only reported.
        split: conditions that are measured apart, one row each: ``psnr_db[sigma=25]``.
        count: number of samples, layers or predictions behind the value.
        alternates: whether its rows alternate, condition by condition, with those of the check above.
    """

    between: str
    metric: str
    applies: Callable[[str, Task], bool]
    measure: Measure
    limit: Callable[[Case], Limit] = lambda case: {}
    split: Callable[[Case], dict[str, Case]] = whole
    count: Callable[[Case], int] = count_samples
    alternates: bool = False

    def row(self, case: Case, condition: str) -> Row:
        """Return the row of one condition."""
        metric = f"{self.metric}[{condition}]" if condition else self.metric
        return Row(self.between, metric, self.measure(case), self.limit(case), self.count(case))


def rows(case: Case, checks: Sequence[Check] = ()) -> list[Row]:
    """Return the rows of every check that applies, in order; by default of ``CHECKS``."""
    groups: list[list[Check]] = []
    for check in checks or CHECKS:
        if not check.applies(case.precision, case.task):
            continue
        if check.alternates:
            groups[-1].append(check)
        else:
            groups.append([check])
    return [
        check.row(part, condition)
        for group in groups
        for condition, part in group[0].split(case).items()
        for check in group
    ]


def report_only(rows: Sequence[Row]) -> list[Row]:
    """Take the limits off the cost of deployment, for a network that was never trained.

    Its features have outliers that training removes, and its decisions are random, so that the cost of 8 bits
    says nothing. The limits on the rewrite and on the runtime's arithmetic stay.
    """
    return [replace(r, limit={}) if r.metric.partition("[")[0] in _QUALITY else r for r in rows]


def tighten_drop(limits: LimitSection, max_drop_db: float | None) -> LimitSection:
    """Return limits with a PSNR drop of ``max_drop_db`` at most.

    Layers stay in float to keep the drop below it on calibration images, so it holds on validation images.
    """
    if max_drop_db is None:
        return limits
    return limits.model_copy(update={"drop_db": min(limits.drop_db, max_drop_db)})


def at_least_rounding(limit: float, rounding: float, dtype: type) -> float:
    """Return a limit on the difference of two programs, or twice the network's float32 rounding if larger.

    Args:
        limit: on a relative difference.
        rounding: relative cost of float32; scaled to ``dtype`` by the ratio of epsilons.
        dtype: float type of the programs.
    """
    scale = float(np.finfo(dtype).eps / np.finfo(np.float32).eps)
    return max(limit, BOTH_PROGRAMS * min(rounding, PROVABLE) * scale)


def _share_limit(case: Case) -> Limit:
    """Limit the INT8 share; a router's is only reported, because its deciding layers stay float."""
    return {} if ROUTER in case.shares else {"at_least": case.limits.int8_share}


def _float16_levels(case: Case) -> Limit:
    """Limit by the recipe, or by the distance of two independent roundings to float16 if that is larger.

    It is larger only where the rounding changes masks.
    """
    cost = mean_levels("quantized", "decomposed")(case)
    return {"at_most": max(case.limits.device_levels, INDEPENDENT * cost)}


def float32_limit(limit: float) -> Callable[[Case], Limit]:
    """Return a limit on the difference of two float32 programs, see ``at_least_rounding``."""
    return lambda case: {"at_most": at_least_rounding(limit, case.rounding, np.float32)}


def _better_than_input(case: Case) -> Limit:
    """Demand an output that is better than the input, unless the input is the truth itself."""
    noisy = psnr_of_input(case)
    return {"at_least": noisy} if math.isfinite(noisy) else {}


def _drop_limit(case: Case) -> Limit:
    return {"at_most": case.limits.drop_db}


def _drop_of_accuracy_limit(case: Case) -> Limit:
    return {"at_most": case.limits.accuracy_drop}


def _sqnr_without_truth(case: Case) -> Limit:
    """Limit the error of a picture by its SQNR only where no truth limits its cost in dB."""
    return {} if case.task.has_truth else {"at_least": case.limits.sqnr_db}


def _agreement_limit(case: Case) -> Limit:
    return {"at_least": case.limits.predictions}


CHECKS = (
    # the cost of the precision
    Check(
        "quantized:decomposed",
        "int8_mac_share",
        on("int8"),
        int8_share,
        _share_limit,
        by_program,
        count_layers,
    ),
    Check(
        "quantized:decomposed",
        "max_abs",
        on("fp32"),
        largest_relative("quantized", "decomposed"),
        float32_limit(FOLDING),
    ),
    Check(
        "quantized:decomposed",
        "residual_sqnr_db",
        residual,
        residual_sqnr("quantized", "decomposed"),
        _sqnr_without_truth,
    ),
    Check(
        "quantized:decomposed",
        "sqnr_db",
        other_picture,
        sqnr("quantized", "decomposed"),
        _sqnr_without_truth,
    ),
    Check(
        "quantized:decomposed",
        "sqnr_db",
        predicts(*LOSSY),
        sqnr("quantized", "decomposed"),
        lambda case: {"at_least": case.limits.sqnr_db},
    ),
    Check(
        "quantized:decomposed",
        "psnr_drop_db",
        truth(*LOSSY),
        mean_drop("quantized"),
        _drop_limit,
        by_condition,
    ),
    # the runtime's arithmetic. A picture in float may differ by a fraction of a grey level. Elsewhere two
    # runtimes that round ties otherwise take other paths through a deep network: distances are then
    # ratios to the cost of the precision.
    Check(
        "device:quantized",
        "mean_abs_levels",
        picture("fp32"),
        mean_levels("device", "quantized"),
        lambda case: {"at_most": case.limits.device_levels},
    ),
    Check(
        "device:quantized",
        "mean_abs_levels",
        picture("fp16"),
        mean_levels("device", "quantized"),
        _float16_levels,
    ),
    Check("device:quantized", "mean_abs_levels", picture("int8"), mean_levels("device", "quantized")),
    Check(
        "device:quantized",
        "mean_relative",
        predicts("fp32"),
        mean_relative("device", "quantized"),
        float32_limit(REORDERING),
    ),
    Check("device:quantized", "mean_relative", predicts(*LOSSY), mean_relative("device", "quantized")),
    Check("device:quantized", "max_abs", on("fp32", *LOSSY), largest("device", "quantized")),
    Check(
        "device:quantized",
        "rms_ratio",
        lambda precision, task: on("int8")(precision, task) or predicts("fp16")(precision, task),
        cost_ratio("device", "quantized"),
        lambda case: {"at_most": INDEPENDENT},
    ),
    Check(
        "device:quantized",
        "noise_ratio",
        on("int8"),
        cost_ratio("device", "decomposed"),
        lambda case: dict(SAME_NOISE),
    ),
    # the truth
    Check("float:truth", "psnr_db", truth(), psnr("decomposed"), _better_than_input, by_condition),
    Check("float:truth", "ssim", truth(), ssim("decomposed"), alternates=True),
    Check("device:truth", "psnr_db", truth(), psnr("device"), _better_than_input, by_condition),
    Check("device:truth", "ssim", truth(), ssim("device"), alternates=True),
    Check("device:truth", "psnr_drop_db", truth(), mean_drop("device"), _drop_limit, by_condition),
    Check("device:truth", "worst_image_psnr_drop_db", truth(), worst_drop("device")),
    Check("device:truth", "worst_tile_psnr_db", truth(), worst_tile("device")),
    # noisy photos without clean ones: no truth is known, the float network is the reference
    Check("float:truth", "images_without_truth", no_truth, count_samples),
    Check(
        "device:float",
        "residual_sqnr_db",
        lambda precision, task: no_truth(precision, task) and task.is_residual,
        residual_sqnr("device", "decomposed"),
        _sqnr_without_truth,
        by_condition,
    ),
    Check(
        "device:float", "sqnr_db", no_truth, sqnr("device", "decomposed"), _sqnr_without_truth, by_condition
    ),
    Check("device:float", "max_abs", no_truth, largest("device", "decomposed")),
    Check(
        "device:float",
        "worst_tile_rms_levels",
        no_truth,
        largest_tile_rms("device", "decomposed"),
        split=at_worst_tile("device", "decomposed"),
    ),
    # labels
    Check("float:labels", "top1_accuracy", labelled, accuracy("decomposed", 1)),
    Check("float:labels", "top5_accuracy", labelled, accuracy("decomposed", 5), split=where_more_than_five),
    Check("device:labels", "top1_accuracy", labelled, accuracy("device", 1)),
    Check("device:labels", "top5_accuracy", labelled, accuracy("device", 5), split=where_more_than_five),
    Check("device:labels", "top1_drop", labelled, accuracy_drop("device", 1), _drop_of_accuracy_limit),
    Check(
        "device:labels",
        "top5_drop",
        labelled,
        accuracy_drop("device", 5),
        _drop_of_accuracy_limit,
        where_more_than_five,
    ),
    # predictions, where no truth is known
    Check(
        "quantized:decomposed",
        "prediction_agreement",
        predicts(),
        agreement("quantized", "decomposed"),
        _agreement_limit,
        count=count_predictions,
    ),
    Check(
        "device:float",
        "prediction_agreement",
        predicts(),
        agreement("device", "decomposed"),
        _agreement_limit,
        count=count_predictions,
    ),
    Check("device:float", "sqnr_db", predicts(), sqnr("device", "decomposed")),
)
