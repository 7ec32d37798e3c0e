"""Measure every step of a build against the one before and against the truth; rows with limits.

    reference -> canonical -> expanded -> quantized -> device
             float64      float64   image quality  arithmetic        float : truth, device : truth

Only numpy and the standard library at import: a device checks its bundle without torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn import metrics
from edgedyn.errors import CheckFailedError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgedyn.calibration import Sample
    from edgedyn.quantize import Quantized
    from edgedyn.recipe import LimitSection


@dataclass(frozen=True)
class Row:
    """One measured number between two things, for instance ``device:truth``.

    Attributes:
        between: ``canonical:reference``, ``expanded:canonical``, ``quantized:expanded``,
            ``device:quantized``, ``float:truth``, ``device:truth``, ``decisions``, or a check of a toolchain.
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

    Args:
        reference: the network in float64.
        canonical: made from ``reference`` in float64, since a rewrite that folds weights is only as exact as
            its arithmetic, and this measures the rewrite.
        expanded: the program; it gets the tensors of ``canonical``, by name.
        samples: noisy images.
        limit: largest max |difference| / max |output|.
    """
    import torch

    graph = copy.deepcopy(expanded.module()).double()
    _copy_parameters(canonical, graph)
    with torch.no_grad():
        images = [torch.from_numpy(s.noisy).double() for s in samples]
        outputs = [[program(x).numpy() for x in images] for program in (reference, canonical, graph)]
    rows = []
    for k, between in ((1, "canonical:reference"), (2, "expanded:canonical")):
        errors = [
            metrics.max_abs(y, x) / float(np.abs(x).max())
            for x, y in zip(outputs[k - 1], outputs[k], strict=True)
        ]
        rows.append(Row(between, "max_relative[float64]", max(errors), {"at_most": limit}, len(samples)))
    return rows


def _copy_parameters(source: nn.Module, program: nn.Module) -> None:
    """Give an exported program, whose tensors keep their dotted names, the float64 tensors of its source."""
    import torch

    wanted = dict(source.named_parameters()) | dict(source.named_buffers())
    with torch.no_grad():
        for name, tensor in (*program.named_parameters(), *program.named_buffers()):
            if name in wanted and tensor.shape == wanted[name].shape:
                tensor.copy_(wanted[name])


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
    return [*rows, *_device_rows(outputs, precision, limits)]


def _device_rows(outputs: Outputs, precision: str, limits: LimitSection) -> list[Row]:
    """Compare the runtime with the program that was exported.

    Two runtimes that round ties otherwise take different paths through a deep INT8 network. So for INT8 two
    distances are taken as ratios to what quantization costs, rms(quantized - expanded): ``rms_ratio`` of
    device - quantized, which is sqrt(2) for independent roundings, and more for another computation; and
    ``noise_ratio`` of device - expanded, which is 0 for a runtime that computes in float.
    """
    count, pairs = len(outputs.samples), list(zip(outputs.device, outputs.quantized, strict=True))
    levels = float(np.mean([metrics.mean_abs_levels(d, q) for d, q in pairs]))
    worst = Row("device:quantized", "max_abs", max(metrics.max_abs(d, q) for d, q in pairs), {}, count)
    if precision != "int8":
        limit = {"at_most": limits.device_levels}
        return [Row("device:quantized", "mean_abs_levels", levels, limit, count), worst]
    cost = _rms(outputs.quantized, outputs.expanded)
    ratio = _rms(outputs.device, outputs.quantized) / cost if cost else math.inf
    noise = _rms(outputs.device, outputs.expanded) / cost if cost else math.inf
    alike = {"at_least": 0.5, "at_most": 2.0}
    return [
        Row("device:quantized", "rms_ratio", ratio, {"at_most": math.sqrt(2)}, count),
        Row("device:quantized", "noise_ratio", noise, alike, count),
        Row("device:quantized", "mean_abs_levels", levels, {}, count),
        worst,
    ]


def _rms(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    squares = [np.mean((x.astype(np.float64) - y) ** 2) for x, y in zip(a, b, strict=True)]
    return float(np.sqrt(np.mean(squares)))


def share_rows(quantized: Quantized, precision: str, limits: LimitSection) -> list[Row]:
    """Give the share of multiply-adds in INT8; none for a float precision."""
    if precision != "int8":
        return []
    limit, count = {"at_least": limits.int8_share}, quantized.multiply_add_nodes
    return [Row("quantized:expanded", "int8_mac_share", quantized.int8_mac_share, limit, count)]


def truth_rows(outputs: Outputs, limits: LimitSection) -> list[Row]:
    """Measure float and device against the truth, by noise level, worst image and worst tile."""
    rows = []
    for between, results in (("float:truth", outputs.expanded), ("device:truth", outputs.device)):
        for sigma, indices in _by_sigma(outputs.samples).items():
            noisy = float(np.mean([metrics.psnr_db(*_noisy_and_truth(outputs.samples[i])) for i in indices]))
            quality = [metrics.psnr_db(results[i], _hwc(outputs.samples[i].truth)) for i in indices]
            likeness = [metrics.ssim(results[i], _hwc(outputs.samples[i].truth)) for i in indices]
            condition = f"[sigma={sigma:g}]"
            # a denoiser has to be better than its input, where that is not the truth itself
            limit = {"at_least": noisy} if math.isfinite(noisy) else {}
            rows.append(Row(between, f"psnr_db{condition}", float(np.mean(quality)), limit, len(indices)))
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


_ROUNDING = {"bucketize", "ceil", "floor", "floor_divide", "heaviside", "round", "sign", "sgn", "trunc"}


def decision_row(program: ExportedProgram) -> Row:
    """Count the data-dependent decisions of a program; each would need rows of agreement and margins.

    A decision is a boolean or integer computed from the input (a comparison, an index, a mask), or a step
    function of it.
    """
    given = set(program.graph_signature.user_inputs)
    from_input = {node for node in program.graph.nodes if node.op == "placeholder" and node.name in given}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    count = 0
    for node in nodes:
        if not from_input.intersection(node.all_input_nodes):
            continue
        from_input.add(node)
        name = getattr(node.target, "_opname", "")
        was_float = all(_is_float(x) for x in node.all_input_nodes if x in from_input)
        count += was_float and (name in _ROUNDING or not _is_float(node))
    return Row("decisions", "decision_nodes", count, {"at_most": 0}, len(nodes))


def _is_float(node: Node) -> bool:
    """Whether all tensors that a graph node gives are floating-point."""
    value: Any = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(v.is_floating_point() for v in values if hasattr(v, "is_floating_point"))


def run_all(
    run: Callable[[np.ndarray], np.ndarray], samples: Sequence[Sample], program: str
) -> list[np.ndarray]:
    """Run a program on every sample; (1, C, H, W) in, (H, W, C) float32 out.

    Raises:
        CheckFailedError: for an output that is not finite, with program, image and noise level.
    """
    images = []
    for sample in samples:
        image = _hwc(np.asarray(run(sample.noisy), dtype=np.float32))
        if broken := int((~np.isfinite(image)).sum()):
            raise CheckFailedError(
                f"the {program} program: found {broken} of {image.size} values that are NaN or infinite for "
                f"{sample.source} with noise of sigma {sample.sigma:g}; expected finite ones. A float16 "
                "overflow? Try precision fp32."
            )
        images.append(image)
    return images


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
