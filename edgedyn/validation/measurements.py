"""The measurements behind the checks: one number from the outputs of one build.

``y`` and ``reference`` name a program by its field in ``runs.Outputs``: decomposed, quantized or device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import CalibrationError
from edgedyn.images import metrics
from edgedyn.validation.runs import Outputs, enlarge, group_by_condition, psnr_db, to_hwc

if TYPE_CHECKING:
    from edgedyn.images.tasks import Task
    from edgedyn.recipe.keys import LimitSection


@dataclass(frozen=True)
class Case:
    """Everything that a check measures and compares with.

    Attributes:
        outputs: of every program on the same samples.
        shares: program -> (share of its multiply-adds in INT8, number of its layers with multiply-adds).
        precision: ``fp32``, ``fp16`` or ``int8``.
        task: kind of network.
        limits: the recipe's, see ``checks.tighten_drop``.
        rounding: relative cost of float32 itself, from ``exactness.exactness_rows``.
    """

    outputs: Outputs
    shares: Mapping[str, tuple[float, int]]
    precision: str
    task: Task
    limits: LimitSection
    rounding: float = 0.0

    def pairs(self, y: str, reference: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the outputs of two programs, sample by sample."""
        return list(zip(getattr(self.outputs, y), getattr(self.outputs, reference), strict=True))


Measure = Callable[[Case], float]


# ---- splits of a case: one row each, by the condition that stands in brackets


def whole(case: Case) -> dict[str, Case]:
    """Return the case itself, under no condition."""
    return {"": case}


def by_condition(case: Case) -> dict[str, Case]:
    """Return one case per noise level, by its name."""
    return {
        condition: replace(case, outputs=case.outputs.take(indices))
        for condition, indices in group_by_condition(case.outputs.samples).items()
    }


def by_program(case: Case) -> dict[str, Case]:
    """Return one case per program, by its name; none for the one program of a network."""
    return {
        "" if name == FORWARD else name: replace(case, shares={name: share})
        for name, share in case.shares.items()
    }


# ---- INT8 share of one program


def int8_share(case: Case) -> float:
    """Return the share of multiply-adds in INT8 of the one program of a case."""
    ((share, _),) = case.shares.values()
    return share


def count_layers(case: Case) -> int:
    """Count the layers behind ``int8_share``."""
    ((_, layers),) = case.shares.values()
    return max(layers, 1)


# ---- one program against another


def count_samples(case: Case) -> int:
    """Count the samples of a case."""
    return len(case.outputs.samples)


def largest(y: str, reference: str) -> Measure:
    """Return the largest absolute difference, in units of the output."""
    return lambda case: max(metrics.max_abs(a, b) for a, b in case.pairs(y, reference))


def largest_relative(y: str, reference: str) -> Measure:
    """Return the largest difference in units of the image's largest value, or of 1 where that is less."""
    return lambda case: max(
        metrics.max_abs(a, b) / max(1.0, float(np.abs(b).max())) for a, b in case.pairs(y, reference)
    )


def mean_relative(y: str, reference: str) -> Measure:
    """Return the mean absolute difference in units of the reference's rms."""
    return lambda case: float(
        np.mean(
            [np.abs(a - b).mean() / (np.sqrt(np.mean(b**2)) + 1e-12) for a, b in case.pairs(y, reference)]
        )
    )


def mean_levels(y: str, reference: str) -> Measure:
    """Return the mean absolute difference in 8-bit grey levels."""
    return lambda case: float(np.mean([metrics.mean_abs_levels(a, b) for a, b in case.pairs(y, reference)]))


def sqnr(y: str, reference: str) -> Measure:
    """Return the mean SQNR, dB."""
    return lambda case: float(np.mean([metrics.sqnr_db(a, b) for a, b in case.pairs(y, reference)]))


def residual_sqnr(y: str, reference: str) -> Measure:
    """Return the mean SQNR of the network's own contribution, output minus input, dB."""

    def measure(case: Case) -> float:
        pairs = zip(case.pairs(y, reference), case.outputs.samples, strict=True)
        return float(np.mean([metrics.sqnr_db(a - s.noisy, b - s.noisy) for (a, b), s in pairs]))

    return measure


def cost_ratio(y: str, reference: str) -> Measure:
    """Return the rms difference in units of the precision's cost, rms(quantized - decomposed)."""

    def measure(case: Case) -> float:
        cost = _rms(case.pairs("quantized", "decomposed"))
        return _rms(case.pairs(y, reference)) / cost if cost else math.inf

    return measure


def _rms(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    squares = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in pairs]
    return float(np.sqrt(np.mean(squares)))


# ---- the largest error of a place, where no truth is known

_TILE = 64  # pixels per side, as ``metrics.worst_tile_psnr_db`` has it


def at_worst_tile(y: str, reference: str) -> Callable[[Case], dict[str, Case]]:
    """Return the split of a case into itself, under the file and the upper left pixel of the worst tile."""

    def split(case: Case) -> dict[str, Case]:
        _, file, column, row = _worst_tile(case, y, reference)
        return {f"{file} x={column} y={row}": case}

    return split


def largest_tile_rms(y: str, reference: str) -> Measure:
    """Return the largest root mean square difference of a tile of any image, in 8-bit grey levels."""
    return lambda case: _worst_tile(case, y, reference)[0]


def _worst_tile(case: Case, y: str, reference: str) -> tuple[float, str, int, int]:
    """Return rms difference, file, column and row of the tile with the largest one."""
    worst = (-1.0, "", 0, 0)
    for (a, b), sample in zip(case.pairs(y, reference), case.outputs.samples, strict=True):
        error = (a.astype(np.float64) - b) ** 2
        for row in range(0, error.shape[2], _TILE):
            for column in range(0, error.shape[3], _TILE):
                rms = 255 * float(np.sqrt(error[:, :, row : row + _TILE, column : column + _TILE].mean()))
                if rms > worst[0]:
                    worst = (rms, sample.source, column, row)
    return worst


# ---- accuracy, where photos have labels


def where_more_than_five(case: Case) -> dict[str, Case]:
    """Return the case where there are more than five classes; the top 5 of five are always right."""
    return {"": case} if case.outputs.decomposed[0].shape[1] > 5 else {}


def accuracy(y: str, most: int) -> Measure:
    """Return the share of photos whose class is among the ``most`` largest logits.

    Raises:
        CalibrationError: by the measure, for a label beyond the logits.
    """
    return lambda case: float(np.mean(_hits(case, y, most)))


def accuracy_drop(y: str, most: int) -> Measure:
    """Return the accuracy of the decomposed program minus that of another one."""
    return lambda case: float(np.mean(_hits(case, "decomposed", most)) - np.mean(_hits(case, y, most)))


def _hits(case: Case, y: str, most: int) -> list[bool]:
    hits = []
    for logits, sample in zip(getattr(case.outputs, y), case.outputs.samples, strict=True):
        classes, label = logits[0].ravel(), sample.label
        if label is None or label >= len(classes):
            raise CalibrationError(
                f"{sample.source} has the label {label}, and the network has {len(classes)} logits, 0 to "
                f"{len(classes) - 1}. Fix the label; classes: names all classes in the order of the logits."
            )
        # of equal logits the first one wins, as in argmax
        rank = int((classes > classes[label]).sum() + (classes[:label] == classes[label]).sum())
        hits.append(rank < most)
    return hits


# ---- predictions, of a task without truth


def agreement(y: str, reference: str) -> Measure:
    """Return the share of equal predictions."""

    def measure(case: Case) -> float:
        predicted = [(_predict(case, a), _predict(case, b)) for a, b in case.pairs(y, reference)]
        return sum(int((a == b).sum()) for a, b in predicted) / count_predictions(case)

    return measure


def count_predictions(case: Case) -> int:
    """Count the predictions behind ``agreement``."""
    return sum(len(_predict(case, y)) for y in case.outputs.decomposed)


def _predict(case: Case, y: np.ndarray) -> np.ndarray:
    assert case.task.predictions is not None  # a task without truth predicts
    return np.atleast_1d(case.task.predictions(y)).ravel()


# ---- one program against the truth


def psnr(y: str) -> Measure:
    """Return the mean PSNR, dB."""
    return lambda case: float(
        np.mean([psnr_db(a, s) for a, s in zip(getattr(case.outputs, y), case.outputs.samples, strict=True)])
    )


def psnr_of_input(case: Case) -> float:
    """Return the mean PSNR of the noisy inputs, enlarged to the truth's size, dB."""
    return float(np.mean([psnr_db(enlarge(sample), sample) for sample in case.outputs.samples]))


def ssim(y: str) -> Measure:
    """Return the mean SSIM."""

    def measure(case: Case) -> float:
        pairs = zip(getattr(case.outputs, y), case.outputs.samples, strict=True)
        return float(np.mean([metrics.ssim(to_hwc(a), to_hwc(s.truth)) for a, s in pairs]))

    return measure


def mean_drop(y: str) -> Measure:
    """Return the mean PSNR drop from the decomposed program, dB."""
    return lambda case: float(np.mean(_drops(case, y)))


def worst_drop(y: str) -> Measure:
    """Return the largest PSNR drop of an image from the decomposed program, dB."""
    return lambda case: max(_drops(case, y))


def _drops(case: Case, y: str) -> list[float]:
    pairs = zip(case.pairs("decomposed", y), case.outputs.samples, strict=True)
    return [psnr_db(before, sample) - psnr_db(after, sample) for (before, after), sample in pairs]


def worst_tile(y: str) -> Measure:
    """Return the lowest PSNR of a tile of any image, dB."""

    def measure(case: Case) -> float:
        pairs = zip(getattr(case.outputs, y), case.outputs.samples, strict=True)
        return min(metrics.worst_tile_psnr_db(to_hwc(a), to_hwc(s.truth)) for a, s in pairs)

    return measure
