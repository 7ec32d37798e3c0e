"""Decisions of a network about its input, float against deployed: masks, gates, overflows.

    mask     logits -> 0 or 1 at every position     flip rate, per precision and runtime
    gate     logits -> a variant                    agreement, with the margin best - second logit

Decisions are discontinuous: a small arithmetic error can change one, and then the output changes much. To
separate the cost of changed decisions from the cost of arithmetic, the quantized network also runs with the
decisions of the float network forced on it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.bundle.manifest import FORWARD
from edgedyn.images import metrics
from edgedyn.quantize.deciding import Mask, find_decisions
from edgedyn.report.rows import Row
from edgedyn.validation.measurements import Case
from edgedyn.validation.runs import psnr_db

if TYPE_CHECKING:
    from edgedyn.bundle.manifest import Routing
    from edgedyn.conversion.convert import Converted, Part
    from edgedyn.images.sample import Sample
    from edgedyn.targets import Target

_BINS = 20  # of the margin histograms, up to 2 rms of the logits


@dataclass(frozen=True)
class Measured:
    """Rows of the report, and histograms for its facts."""

    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)


def measure(converted: Converted, target: Target, case: Case) -> Measured:
    """Compare the decisions of the quantized and the lowered programs with those of the float ones.

    Masks inside a lowered program are invisible from outside. So the target lowers it once more, into a
    temporary folder, with the mask logits as further outputs.

    Args:
        converted: every program.
        target: that lowered them.
        case: outputs and limits.
    """
    routing = converted.routing
    # a capacity variant also sorts positions, no decision to measure: its overflow is measured as routing
    capacity, whole = routing.variants if routing and routing.rule == "fallback" else ("", FORWARD)
    unknown, masked = 0, False
    for name, part in converted.parts.items():
        masks, others = find_decisions(part.decomposed)
        masked |= name == whole and bool(masks)
        if name != capacity:
            unknown += others + len(masks) * (name != whole)
    nodes = sum(len(part.decomposed.graph.nodes) for part in converted.parts.values())
    rows = [Row("decisions", "unmeasured_decisions", unknown, {"at_most": 0}, nodes)]
    facts: dict[str, Any] = {}
    if masked:
        measured = measure_masks(converted.parts[whole], target, case)
        rows, facts = rows + measured.rows, measured.facts
    if routing is not None:
        measured = measure_routes(routing, case)
        rows, facts = rows + measured.rows, facts | measured.facts
    return Measured(rows, facts)


class _Interpreter(fx.Interpreter):
    """Run a program and record the logits of its masks; forced masks replace its own."""

    def __init__(self, module: fx.GraphModule, masks: Sequence[Mask], forced: Sequence[Tensor] = ()) -> None:
        super().__init__(module)
        self.logits: dict[str, Tensor] = {mask.logits: torch.empty(0) for mask in masks}
        self.forced = {m.node: (m, set_) for m, set_ in zip(masks, forced, strict=True)} if forced else {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.logits:
            self.logits[n.name] = value
        if n.name in self.forced:
            mask, set_ = self.forced[n.name]
            return set_.to(value.dtype) - 1 if mask.is_floor else set_
        return value


def run_noting(
    program: ExportedProgram,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    forced: Sequence[Sequence[np.ndarray]] | None = None,
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Run a program on samples; return its first output and the logits of its masks per sample, float32.

    Args:
        program: decomposed or quantized program of one network; both have their masks in the same order.
        samples: its inputs.
        dtype: of its inputs.
        forced: per sample and mask the booleans that replace the decision.
    """
    module, masks = program.module(), find_decisions(program)[0]
    assert isinstance(module, fx.GraphModule)
    results = []
    for index, sample in enumerate(samples):
        set_masks = [torch.from_numpy(np.asarray(mask)) for mask in forced[index]] if forced else []
        interpreter = _Interpreter(module, masks, set_masks)
        with torch.no_grad():
            y = interpreter.run(*(torch.from_numpy(x).to(dtype) for x in sample.inputs))
        first = y[0] if isinstance(y, tuple | list) else y
        logits = [interpreter.logits[mask.logits].float().numpy() for mask in masks]
        results.append((first.float().numpy(), logits))
    return results


def expose(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Return the program with the logits of its masks as further outputs."""
    names = [mask.logits for mask in find_decisions(program)[0]]
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    nodes = {node.name: node for node in module.graph.nodes}
    logits = [nodes[name] for name in names]
    end = next(node for node in module.graph.nodes if node.op == "output")
    first = end.args[0][0] if isinstance(end.args[0], tuple | list) else end.args[0]
    end.args = ((first, *logits),)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    return torch.export.export(module, inputs)


def measure_masks(part: Part, target: Target, case: Case) -> Measured:
    """Measure the share of mask positions that change, and its cost."""
    samples, half = case.outputs.samples, case.precision == "fp16"
    masks, _ = find_decisions(part.decomposed)
    dtype = torch.float16 if half else torch.float32
    float_ = run_noting(part.decomposed, samples, torch.float32)
    quantized = run_noting(part.program, samples, dtype)
    inputs = tuple(x.half() for x in part.inputs) if half else part.inputs
    device = _run_exposed(expose(part.program, inputs), target, samples, case.precision)
    expected = [[m.decide(x) for m, x in zip(masks, logits, strict=True)] for _, logits in float_]
    rows: list[Row] = []
    facts: dict[str, Any] = {"masks": [mask.path for mask in masks]}
    for where, logits_of in (("quantized", [x for _, x in quantized]), ("device", device)):
        flips, margins = _flips(masks, [x for _, x in float_], logits_of, expected)
        rate = float(flips.mean()) if flips.size else math.nan
        largest = float(margins[flips].max(initial=0))
        limit = {"at_most": case.limits.mask_flips}
        rows.append(Row("decisions", f"mask_flip_rate[{where}]", rate, limit, flips.size))
        crossed = {"at_most": case.limits.flipped_margin}
        rows.append(Row("decisions", f"largest_flipped_margin[{where}]", largest, crossed, flips.size))
        facts[f"margins_{where}"] = _histogram(margins, flips)
        if flips.any():
            facts[f"worst_mask_{where}"] = _worst_mask(masks, expected, margins, flips)
    active = np.concatenate([m.ravel() for per_sample in expected for m in per_sample])
    rows.append(Row("decisions", "active_fraction", float(active.mean()), {}, active.size))
    forced = run_noting(part.program, samples, dtype, expected)
    before, after, kept = ([y for y, _ in results] for results in (float_, quantized, forced))
    before, after, kept = ([case.outputs.decode(y) for y in ys] for ys in (before, after, kept))
    rows += _cost_rows(before, after, kept, case)
    return Measured(rows, {"decisions": facts})


def _run_exposed(
    program: ExportedProgram, target: Target, samples: Sequence[Sample], precision: str
) -> list[list[np.ndarray]]:
    """Lower a program with exposed logits into a temporary folder; return the logits from its runtime."""
    dtype = np.float16 if precision == "fp16" else np.float32
    with tempfile.TemporaryDirectory() as folder:
        artifact = target.lower({FORWARD: program}, Path(folder), precision)
        run = target.load(Path(folder) / artifact.programs[FORWARD], FORWARD)
        outputs = [run(*(x.astype(dtype) for x in sample.inputs)) for sample in samples]
    return [[np.asarray(x, np.float32) for x in logits] for _, *logits in outputs]


def _flips(
    masks: Sequence[Mask],
    float_: Sequence[Sequence[np.ndarray]],
    actual: Sequence[Sequence[np.ndarray]],
    expected: Sequence[Sequence[np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the changed positions, and every position's float margin in units of its mask's rms logit."""
    flips, margins = [], []
    for k, mask in enumerate(masks):
        reference = np.concatenate([logits[k].ravel() for logits in float_]) - mask.threshold
        here = np.concatenate([mask.decide(logits[k]).ravel() for logits in actual])
        flips.append(here != np.concatenate([m[k].ravel() for m in expected]))
        margins.append(np.abs(reference) / max(float(np.sqrt(np.mean(reference**2))), 1e-30))
    return np.concatenate(flips), np.concatenate(margins)


def _worst_mask(
    masks: Sequence[Mask], expected: Sequence[Sequence[np.ndarray]], margins: np.ndarray, flips: np.ndarray
) -> str:
    """Return the path of the mask with the largest margin among the changed positions."""
    ends = np.cumsum([sum(sample[k].size for sample in expected) for k in range(len(masks))])
    worst = int(np.argmax(np.where(flips, margins, -1)))
    return masks[int(np.searchsorted(ends, worst, side="right"))].path


def _histogram(margins: np.ndarray, changed: np.ndarray) -> dict[str, list[float]]:
    """Count all margins, and those of changed decisions; the last bin also holds those beyond it."""
    edges = np.linspace(0, 2, _BINS + 1)
    clipped = np.minimum(margins, edges[-1])
    return {
        "edges": edges.tolist(),
        "all": np.histogram(clipped, edges)[0].tolist(),
        "changed": np.histogram(clipped[changed], edges)[0].tolist(),
    }


def measure_routes(routing: Routing, case: Case) -> Measured:
    """Measure the share of images that keep their variant, and the cost of the others."""
    outputs, samples = case.outputs, case.outputs.samples
    float_ = [d for d in outputs.decided["decomposed"] if d is not None]
    picked = np.array([d.index for d in float_])
    rows, facts = [], {"variants": list(routing.variants), "picked": np.bincount(picked).tolist()}
    margins = np.array([d.margin for d in float_])
    scale = max(float(np.sqrt(np.mean(margins**2))), 1e-30)
    # where an image fits the capacity variant, both variants give the same output: the choice costs nothing
    is_gate = routing.rule == "argmax"
    for where in ("quantized", "device"):
        decided = [d for d in outputs.decided[where] if d is not None]
        same = np.array([d.index for d in decided]) == picked
        limit = {"at_least": case.limits.gate} if is_gate else {}
        rows.append(Row("decisions", f"gate_agreement[{where}]", float(same.mean()), limit, len(same)))
        if is_gate:
            largest = float((margins / scale)[~same].max(initial=0))
            crossed = {"at_most": case.limits.flipped_margin}
            rows.append(
                Row("decisions", f"largest_flipped_gate_margin[{where}]", largest, crossed, len(same))
            )
        facts[f"gate_margins_{where}"] = _histogram(margins / scale, ~same)
    if not is_gate:
        rows.append(Row("decisions", "fallback_rate", float(picked.mean()), {}, len(picked)))
    else:
        rows.append(Row("decisions", "smallest_gate_margin", float(margins.min()), {}, len(margins)))
    run = outputs.dispatchers["quantized"].run
    forced = [
        outputs.decode(np.asarray(run(*s.inputs, forced=int(k))[0][0], np.float32))
        for s, k in zip(samples, picked, strict=True)
    ]
    rows += _cost_rows(outputs.decomposed, outputs.quantized, forced, case, "[gate]")
    return Measured(rows, {"routes": facts})


def _cost_rows(
    float_: Sequence[np.ndarray],
    quantized: Sequence[np.ndarray],
    forced: Sequence[np.ndarray],
    case: Case,
    condition: str = "",
) -> list[Row]:
    """Split the cost of a precision into arithmetic (float decisions forced) and changed decisions."""
    samples, count = case.outputs.samples, len(case.outputs.samples)
    if case.task.has_truth:
        before, after, kept = (
            np.mean([psnr_db(y, s) for y, s in zip(ys, samples, strict=True)])
            for ys in (float_, quantized, forced)
        )
        return [
            Row("decisions", f"arithmetic_cost_db{condition}", float(before - kept), {}, count),
            Row("decisions", f"flips_cost_db{condition}", float(kept - after), {}, count),
        ]
    with_flips, without = (
        float(np.mean([metrics.sqnr_db(y, e) for y, e in zip(ys, float_, strict=True)]))
        for ys in (quantized, forced)
    )
    return [
        Row("decisions", f"sqnr_forced_db{condition}", without, {}, count),
        Row("decisions", f"sqnr_free_db{condition}", with_flips, {}, count),
    ]
