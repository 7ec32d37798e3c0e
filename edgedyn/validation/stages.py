"""Measure every step of a build against the one before and against the truth; rows with limits.

    reference -> canonical -> decomposed -> quantized -> device
             float64      float64   image quality  arithmetic        float : truth, device : truth

Only numpy and the standard library at import: a device checks its bundle without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgedyn.bundle.dispatch import Decision, Dispatcher, Run
from edgedyn.bundle.manifest import FORWARD, ROUTER
from edgedyn.errors import CheckFailedError
from edgedyn.images import metrics
from edgedyn.images.tasks import TASKS, Task
from edgedyn.report.rows import Row

if TYPE_CHECKING:
    from edgedyn.images.image_set import Sample
    from edgedyn.quantize import Quantized
    from edgedyn.recipe.keys import LimitSection
    from edgedyn.recipe.recipe import Recipe


@dataclass(frozen=True)
class Outputs:
    """What each program made of the same samples.

    Attributes:
        samples: what was given.
        decomposed: outputs (1, ...) float32 of the exact rewrite, in PyTorch.
        quantized: of the program at the recipe's precision, in PyTorch.
        device: of the lowered program, in its runtime.
        decided: for each of the three by name, which variant was picked, and how; None where none is.
        dispatchers: the three programs themselves.
    """

    samples: Sequence[Sample]
    decomposed: list[np.ndarray]
    quantized: list[np.ndarray]
    device: list[np.ndarray]
    decided: Mapping[str, list[Decision | None]] = field(default_factory=dict)
    dispatchers: Mapping[str, Dispatcher] = field(default_factory=dict)


def rows(
    outputs: Outputs, recipe: Recipe, quantized: Mapping[str, Quantized], rounding: float = 0.0
) -> list[Row]:
    """Compare the steps after the rewrite with each other, and with the truth where the task has one.

    Args:
        outputs: of every step.
        recipe: says precision, task and limits.
        quantized: the programs by name.
        rounding: value of ``rounding_row``.
    """
    task, limits = TASKS[recipe.task], recipe.limits
    if recipe.quantize.max_drop_db is not None:  # what layers stay float for holds on the validation set, too
        least = min(limits.drop_db, recipe.quantize.max_drop_db)
        limits = limits.model_copy(update={"drop_db": least})
    found = share_rows(quantized, recipe.precision, limits)
    found += arithmetic_rows(outputs, recipe.precision, limits, task, rounding)
    found += truth_rows(outputs, limits) if task.has_truth else prediction_rows(outputs, limits, task)
    return found


_QUALITY = (
    "psnr_db",
    "psnr_drop_db",
    "residual_sqnr_db",
    "sqnr_db",
    "prediction_agreement",
    "mask_flip_rate",
    "gate_agreement",
    "largest_flipped_margin",
    "largest_flipped_gate_margin",
)


def report_only(rows: Sequence[Row]) -> list[Row]:
    """Take the limits off what deployment costs, for a network that has not learned anything.

    Its features have outliers that training removes, and its decisions are the toss of a coin: what 8 bits do
    to them says nothing. That the rewrite is exact, and that the runtime computes what was exported, stays
    demanded.
    """
    return [replace(r, limit={}) if r.metric.partition("[")[0] in _QUALITY else r for r in rows]


def rounding_row(exact: Sequence[np.ndarray], float32: Sequence[np.ndarray]) -> Row:
    """Measure what float32 itself costs: how far a network's outputs are from its own in float64.

    A deep network can amplify rounding (an untrained DDF-ResNet-101 by four orders), and two correct programs
    then differ by up to twice this: no comparison of two of them can demand less.
    """
    return Row("canonical:reference", "rounding[float32]", _max_relative(exact, float32), {}, len(exact))


def _max_relative(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    return max(metrics.max_abs(y, x) / float(np.abs(x).max()) for x, y in zip(wanted, found, strict=True))


def at_least_rounding(limit: float, rounding: float, dtype: type) -> float:
    """Return a limit on the difference of two programs, or twice the network's own rounding if that is more.

    Args:
        limit: on a relative difference.
        rounding: value of ``rounding_row``; scaled to ``dtype`` by the ratio of epsilons. From 1 % in float32
            on, nothing can be proved by comparing, and the limit grows no more.
        dtype: float type of the programs.
    """
    scale = float(np.finfo(dtype).eps / np.finfo(np.float32).eps)
    return max(limit, 2 * min(rounding, 0.01) * scale)


def rewrite_rows(
    exact: Sequence[np.ndarray],
    canonical: Run,
    decomposed: Callable[..., list[np.ndarray]],
    samples: Sequence[Sample],
    limit: float,
) -> list[Row]:
    """Compare reference, canonical and decomposed networks in float64 on real noisy images.

    Args:
        exact: what the reference, in float64, makes of the samples.
        canonical: made from the reference in float64, since a rewrite that folds weights is only as exact as
            its arithmetic, and this measures the rewrite.
        decomposed: the programs with the tensors of ``canonical``, see ``to_float64``.
        samples: noisy images.
        limit: largest max |difference| / max |output|.
    """
    rows, before = [], exact
    for between, program in (("canonical:reference", canonical), ("decomposed:canonical", decomposed)):
        after = run_wide(program, samples)
        error = _max_relative(before, after)
        rows.append(Row(between, "max_relative[float64]", error, {"at_most": limit}, len(samples)))
        before = after
    return rows


def run_wide(program: Callable[..., list[np.ndarray]], samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return the first output of a float64 program for every sample."""
    return [program(*(x.astype(np.float64) for x in sample.inputs))[0] for sample in samples]


def arithmetic_rows(
    outputs: Outputs,
    precision: str,
    limits: LimitSection,
    task: Task = TASKS["denoise"],
    rounding: float = 0.0,
) -> list[Row]:
    """Compare the quantized with the decomposed program, and the device with the quantized one."""
    count = len(outputs.samples)
    pairs = list(zip(outputs.quantized, outputs.decomposed, strict=True))
    if precision == "fp32":
        errors = [metrics.max_abs(q, e) / max(1.0, float(np.abs(e).max())) for q, e in pairs]
        # BatchNorm folding moves one rounding a layer; 1/16 of an 8-bit level is far above it and below sight
        limit = {"at_most": at_least_rounding(1 / 255 / 16, rounding, np.float32)}
        found = [Row("quantized:decomposed", "max_abs", max(errors), limit, count)]
        return [*found, *_device_rows(outputs, precision, limits, task, rounding)]
    given = [s.noisy if task.is_residual else np.float32(0) for s in outputs.samples]
    found_db = [metrics.sqnr_db(q - x, e - x) for (q, e), x in zip(pairs, given, strict=True)]
    metric, limit = ("residual_sqnr_db", {}) if task.is_residual else ("sqnr_db", {})
    if not task.has_truth:
        limit = {"at_least": limits.sqnr_db}
    found = [Row("quantized:decomposed", metric, float(np.mean(found_db)), limit, count)]
    if task.has_truth:
        found += _drop_rows(
            "quantized:decomposed", outputs.decomposed, outputs.quantized, outputs.samples, limits.drop_db
        )
    return [*found, *_device_rows(outputs, precision, limits, task, rounding)]


def _device_rows(
    outputs: Outputs, precision: str, limits: LimitSection, task: Task, rounding: float
) -> list[Row]:
    """Compare the runtime with the program that was exported.

    A picture in a float precision may differ by a fraction of a grey level; in float16 also by sqrt(2) of
    what that precision itself costs, which is more only where masks turn. Elsewhere two runtimes that round
    ties otherwise take different paths through a deep network. So two distances are taken as ratios to what
    the precision costs, rms(quantized - decomposed): ``rms_ratio`` of device - quantized, sqrt(2) for
    independent roundings, and more for another computation; and for INT8 ``noise_ratio`` of device -
    decomposed, which is 0 for a runtime that computes in float.
    """
    count, pairs = len(outputs.samples), list(zip(outputs.device, outputs.quantized, strict=True))
    worst = Row("device:quantized", "max_abs", max(metrics.max_abs(d, q) for d, q in pairs), {}, count)
    found = [_mean_row(outputs, precision, limits, task, rounding), worst]
    if precision == "fp32" or (precision == "fp16" and task.has_truth):
        return found
    cost = _rms(outputs.quantized, outputs.decomposed)
    ratio = _rms(outputs.device, outputs.quantized) / cost if cost else math.inf
    found.append(Row("device:quantized", "rms_ratio", ratio, {"at_most": math.sqrt(2)}, count))
    if precision == "int8":
        noise = _rms(outputs.device, outputs.decomposed) / cost if cost else math.inf
        alike = {"at_least": 0.5, "at_most": 2.0}
        found.append(Row("device:quantized", "noise_ratio", noise, alike, count))
    return found


def _mean_row(outputs: Outputs, precision: str, limits: LimitSection, task: Task, rounding: float) -> Row:
    """Give the mean difference: of a picture in grey levels, else as a share of the output's rms."""
    pairs = list(zip(outputs.device, outputs.quantized, strict=True))
    if task.has_truth:
        levels = _mean_levels(outputs.device, outputs.quantized)
        cost = _mean_levels(outputs.quantized, outputs.decomposed) if precision == "fp16" else 0.0
        limit = {"at_most": max(limits.device_levels, math.sqrt(2) * cost)} if precision != "int8" else {}
        return Row("device:quantized", "mean_abs_levels", levels, limit, len(pairs))
    mean = float(np.mean([np.abs(d - q).mean() / (np.sqrt(np.mean(q**2)) + 1e-12) for d, q in pairs]))
    # float32: thousands of roundings of 6e-8, in another order
    limit = {"at_most": at_least_rounding(1e-4, rounding, np.float32)} if precision == "fp32" else {}
    return Row("device:quantized", "mean_relative", mean, limit, len(pairs))


def _mean_levels(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return float(np.mean([metrics.mean_abs_levels(x, y) for x, y in zip(a, b, strict=True)]))


def _rms(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    squares = [np.mean((x.astype(np.float64) - y) ** 2) for x, y in zip(a, b, strict=True)]
    return float(np.sqrt(np.mean(squares)))


def share_rows(quantized: Mapping[str, Quantized], precision: str, limits: LimitSection) -> list[Row]:
    """Give the share of multiply-adds in INT8 of each program; none for a float precision.

    A router decides, and so stays float where it does: its share is only reported.
    """
    if precision != "int8":
        return []
    found = []
    for name, part in quantized.items():
        metric = "int8_mac_share" if name == FORWARD else f"int8_mac_share[{name}]"
        limit = {} if name == ROUTER else {"at_least": limits.int8_share}
        found.append(
            Row("quantized:decomposed", metric, part.int8_mac_share, limit, max(part.multiply_add_nodes, 1))
        )
    return found


def prediction_rows(outputs: Outputs, limits: LimitSection, task: Task) -> list[Row]:
    """Compare what the outputs say, the class or the position of each keypoint, with the float program's."""
    assert task.predictions is not None  # a task without truth says something
    said = [np.atleast_1d(task.predictions(y)).ravel() for y in outputs.decomposed]
    count = sum(len(predictions) for predictions in said)
    found = []
    for between, results in (("quantized:decomposed", outputs.quantized), ("device:float", outputs.device)):
        same = sum(
            int((np.atleast_1d(task.predictions(y)).ravel() == s).sum())
            for y, s in zip(results, said, strict=True)
        )
        limit = {"at_least": limits.predictions}
        found.append(Row(between, "prediction_agreement", same / count, limit, count))
    errors = [metrics.sqnr_db(d, e) for d, e in zip(outputs.device, outputs.decomposed, strict=True)]
    found.append(Row("device:float", "sqnr_db", float(np.mean(errors)), {}, len(errors)))
    return found


def truth_rows(outputs: Outputs, limits: LimitSection) -> list[Row]:
    """Measure float and device against the truth, by noise level, worst image and worst tile."""
    rows = []
    for between, results in (("float:truth", outputs.decomposed), ("device:truth", outputs.device)):
        for name, indices in _by_condition(outputs.samples).items():
            noisy = float(np.mean([_psnr_of_input(outputs.samples[i]) for i in indices]))
            quality = [metrics.psnr_db(to_hwc(results[i]), to_hwc(outputs.samples[i].truth)) for i in indices]
            likeness = [metrics.ssim(to_hwc(results[i]), to_hwc(outputs.samples[i].truth)) for i in indices]
            condition = f"[{name}]"
            # a network has to be better than its input, where that is not the truth itself
            limit = {"at_least": noisy} if math.isfinite(noisy) else {}
            rows.append(Row(between, f"psnr_db{condition}", float(np.mean(quality)), limit, len(indices)))
            rows.append(Row(between, f"ssim{condition}", float(np.mean(likeness)), {}, len(indices)))
    rows += _drop_rows("device:truth", outputs.decomposed, outputs.device, outputs.samples, limits.drop_db)
    drops = [
        metrics.psnr_db(to_hwc(e), to_hwc(s.truth)) - metrics.psnr_db(to_hwc(d), to_hwc(s.truth))
        for e, d, s in zip(outputs.decomposed, outputs.device, outputs.samples, strict=True)
    ]
    tiles = [
        metrics.worst_tile_psnr_db(to_hwc(d), to_hwc(s.truth))
        for d, s in zip(outputs.device, outputs.samples, strict=True)
    ]
    rows.append(Row("device:truth", "worst_image_psnr_drop_db", max(drops), {}, len(drops)))
    rows.append(Row("device:truth", "worst_tile_psnr_db", min(tiles), {}, len(tiles)))
    return rows


def _psnr_of_input(sample: Sample) -> float:
    return metrics.psnr_db(to_hwc(enlarge(sample)), to_hwc(sample.truth))


def enlarge(sample: Sample) -> np.ndarray:
    """Return the noisy input, its pixels repeated where the truth is larger, (1, C, H, W)."""
    scale = sample.truth.shape[2] // sample.noisy.shape[2]
    return sample.noisy.repeat(scale, axis=2).repeat(scale, axis=3)


def run_all(
    run: Dispatcher, samples: Sequence[Sample], program: str, dtype: type = np.float32
) -> list[tuple[np.ndarray, Decision | None]]:
    """Run a program on every sample; return its first output (1, ...) in float32, and what was decided.

    Raises:
        CheckFailedError: for an output that is not finite, with program, image and noise level.
    """
    results = []
    for sample in samples:
        found, decision = run.run(*(x.astype(dtype) for x in sample.inputs))
        y = np.asarray(found[0], dtype=np.float32)
        if broken := int((~np.isfinite(y)).sum()):
            raise CheckFailedError(
                f"the {program} program: found {broken} of {y.size} values that are NaN or infinite for "
                f"{sample.source} with noise of sigma {sample.sigma:g}; expected finite ones. A float16 "
                "overflow? Try precision fp32."
            )
        results.append((y, decision))
    return results


def _drop_rows(
    between: str, before: list[np.ndarray], after: list[np.ndarray], samples: Sequence[Sample], limit: float
) -> list[Row]:
    rows = []
    for condition, indices in _by_condition(samples).items():
        drops = [psnr_of(before[i], samples[i]) - psnr_of(after[i], samples[i]) for i in indices]
        metric = f"psnr_drop_db[{condition}]"
        rows.append(Row(between, metric, float(np.mean(drops)), {"at_most": limit}, len(indices)))
    return rows


def psnr_of(y: np.ndarray, sample: Sample) -> float:
    """Return the PSNR of an output (1, C, H, W) against its sample's truth, dB."""
    return metrics.psnr_db(to_hwc(y), to_hwc(sample.truth))


def _by_condition(samples: Sequence[Sample]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda i: samples[i].sigma):
        groups.setdefault(samples[index].condition, []).append(index)
    return groups


def to_hwc(array: np.ndarray) -> np.ndarray:
    """Turn (1, C, H, W) into (H, W, C)."""
    return np.ascontiguousarray(array[0].transpose(1, 2, 0))
