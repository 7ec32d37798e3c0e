"""Measure every step of a build against the one before and against the truth; rows with limits.

    reference -> canonical -> expanded -> quantized -> device        float64 | float64 | image quality | arithmetic
                                              float : truth, device : truth

Only numpy and the standard library at import: a device checks its bundle without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgedyn import metrics

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from edgedyn.calibration import Sample
    from edgedyn.recipe import LimitSection


@dataclass(frozen=True)
class Row:
    """One measured number between two things, for instance ``device:truth``.

    Attributes:
        between: ``canonical:reference``, ``expanded:canonical``, ``quantized:expanded``, ``device:quantized``,
            ``float:truth``, ``device:truth``, ``decisions``, or a check of a toolchain.
        metric: name with its unit, ``psnr_db``; a condition follows in brackets, ``psnr_db[sigma=25]``.
        value: the measurement.
        limit: ``{"at_least": x}``, ``{"at_most": x}``, or empty where the number is only reported.
        samples: images, tensors or nodes that the number was measured on.
    """

    between: str
    metric: str
    value: float
    limit: dict[str, float]
    samples: int

    @property
    def passed(self) -> bool:
        """Whether something was measured and the limit holds; not-a-number never passes."""
        if self.samples < 1 or math.isnan(self.value):
            return False
        low = self.limit.get("at_least", -math.inf)
        return low <= self.value <= self.limit.get("at_most", math.inf)

    def to_json(self) -> dict[str, object]:
        """Return the row as JSON values, ``passed`` included."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class ValidationReport:
    """All rows of one build or check."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether there are rows and all pass: nothing compared is not a success."""
        return bool(self.rows) and all(row.passed for row in self.rows)


@dataclass(frozen=True)
class Outputs:
    """What each program made of the same noisy samples; lists of (H, W, C) float32."""

    samples: Sequence[Sample]
    expanded: list[np.ndarray]
    quantized: list[np.ndarray]
    device: list[np.ndarray]


def rewrite_rows(
    reference: nn.Module,
    canonical: nn.Module,
    expanded: ExportedProgram,
    samples: Sequence[Sample],
    limit: float,
) -> list[Row]:
    """Compare reference, canonical and expanded networks in float64 on real noisy images.

    The error is max |difference| / max |output|, so that no tolerance hides an index error.
    """
    import torch

    programs = [reference, canonical, expanded.module()]
    with torch.no_grad():
        outputs = [
            [program.double()(torch.from_numpy(s.noisy).double()).numpy() for s in samples]
            for program in programs
        ]
        for program in programs:
            program.float()
    names = ["reference", "canonical", "expanded"]
    rows = []
    for k in (1, 2):
        errors = [
            metrics.max_abs(y, x) / float(np.abs(x).max())
            for x, y in zip(outputs[k - 1], outputs[k], strict=True)
        ]
        between = f"{names[k]}:{names[k - 1]}"
        rows.append(Row(between, "max_relative[float64]", max(errors), {"at_most": limit}, len(samples)))
    return rows


def arithmetic_rows(outputs: Outputs, precision: str, limits: LimitSection) -> list[Row]:
    """Compare the quantized with the expanded program, and the device with the quantized one."""
    count = len(outputs.samples)
    rows = []
    if precision != "fp32":
        noise = [s.noisy[0].transpose(1, 2, 0) for s in outputs.samples]
        residuals = [
            metrics.sqnr_db(q - n, e - n)
            for q, e, n in zip(outputs.quantized, outputs.expanded, noise, strict=True)
        ]
        rows.append(Row("quantized:expanded", "residual_sqnr_db", float(np.mean(residuals)), {}, count))
        rows += _drop_rows(
            "quantized:expanded", outputs.expanded, outputs.quantized, outputs.samples, limits.drop_db
        )
    else:
        errors = [metrics.max_abs(q, e) for q, e in zip(outputs.quantized, outputs.expanded, strict=True)]
        # BatchNorm folding moves one rounding a layer; 1/16 of an 8-bit level is far above it and below sight
        rows.append(Row("quantized:expanded", "max_abs", max(errors), {"at_most": 1 / 255 / 16}, count))
    pairs = list(zip(outputs.device, outputs.quantized, strict=True))
    levels = float(np.mean([metrics.mean_abs_levels(d, q) for d, q in pairs]))
    rows.append(Row("device:quantized", "mean_abs_levels", levels, {"at_most": limits.device_levels}, count))
    rows.append(Row("device:quantized", "max_abs", max(metrics.max_abs(d, q) for d, q in pairs), {}, count))
    return rows


def truth_rows(outputs: Outputs, limits: LimitSection) -> list[Row]:
    """Measure float and device against the truth, by noise level, worst image and worst tile."""
    rows = []
    for between, results in (("float:truth", outputs.expanded), ("device:truth", outputs.device)):
        for sigma, indices in _by_sigma(outputs.samples).items():
            noisy = float(np.mean([metrics.psnr_db(*_noisy_and_truth(outputs.samples[i])) for i in indices]))
            quality = [metrics.psnr_db(results[i], _hwc(outputs.samples[i].truth)) for i in indices]
            likeness = [metrics.ssim(results[i], _hwc(outputs.samples[i].truth)) for i in indices]
            condition = f"[sigma={sigma:g}]"
            # a denoiser has to be better than its input
            rows.append(
                Row(
                    between, f"psnr_db{condition}", float(np.mean(quality)), {"at_least": noisy}, len(indices)
                )
            )
            rows.append(Row(between, f"ssim{condition}", float(np.mean(likeness)), {}, len(indices)))
    rows += _drop_rows("device:truth", outputs.expanded, outputs.device, outputs.samples, limits.drop_db)
    drops = [
        metrics.psnr_db(e, _hwc(s.truth)) - metrics.psnr_db(d, _hwc(s.truth))
        for e, d, s in zip(outputs.expanded, outputs.device, outputs.samples, strict=True)
    ]
    tiles = [
        metrics.worst_tile_psnr_db(d, _hwc(s.truth))
        for d, s in zip(outputs.device, outputs.samples, strict=True)
    ]
    rows.append(Row("device:truth", "worst_image_psnr_drop_db", max(drops), {}, len(drops)))
    rows.append(Row("device:truth", "worst_tile_psnr_db", min(tiles), {}, len(tiles)))
    return rows


_DECISIONS = (
    "argmax",
    "argmin",
    "topk",
    "sort",
    "nonzero",
    "where",
    "ge",
    "gt",
    "le",
    "lt",
    "eq",
    "ne",
    "sign",
)


def decision_row(program: ExportedProgram) -> Row:
    """Count the data-dependent decisions of a program; each would need rows of agreement and margins of its own."""
    names = [str(node.target).split(".") for node in program.graph.nodes if node.op == "call_function"]
    decisions = [name for name in names if len(name) > 1 and name[1] in _DECISIONS]
    return Row("decisions", "decision_nodes", len(decisions), {"at_most": 0}, len(names))


def run_all(run: Callable[[np.ndarray], np.ndarray], samples: Sequence[Sample]) -> list[np.ndarray]:
    """Run a program on every sample; (1, C, H, W) in, (H, W, C) float32 out."""
    return [_hwc(np.asarray(run(s.noisy), dtype=np.float32)) for s in samples]


def _drop_rows(
    between: str, before: list[np.ndarray], after: list[np.ndarray], samples: Sequence[Sample], limit: float
) -> list[Row]:
    rows = []
    for sigma, indices in _by_sigma(samples).items():
        drops = [
            metrics.psnr_db(before[i], _hwc(samples[i].truth))
            - metrics.psnr_db(after[i], _hwc(samples[i].truth))
            for i in indices
        ]
        metric = f"psnr_drop_db[sigma={sigma:g}]"
        rows.append(Row(between, metric, float(np.mean(drops)), {"at_most": limit}, len(indices)))
    return rows


def _by_sigma(samples: Sequence[Sample]) -> dict[float, list[int]]:
    groups: dict[float, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.sigma, []).append(index)
    return dict(sorted(groups.items()))


def _noisy_and_truth(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return _hwc(sample.noisy), _hwc(sample.truth)


def _hwc(array: np.ndarray) -> np.ndarray:
    """Turn (1, C, H, W) into (H, W, C)."""
    return np.ascontiguousarray(array[0].transpose(1, 2, 0))
