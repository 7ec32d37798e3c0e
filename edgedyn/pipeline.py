"""The straight line from a recipe to a bundle. Read this first.

    recipe -> model -> canonical -> captured -> expanded -> quantized -> lowered -> validated -> bundle

Each line of ``build`` is a function of typed values and can be called alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import ops, quantize, targets, validate
from edgedyn.bundle import Bundle, refuse_existing, staging_folder, write_bundle
from edgedyn.calibration import CalibrationSet, open_set, refuse_overlap
from edgedyn.contents import choose_pictures, describe, write_texts, write_vectors
from edgedyn.errors import CalibrationError, ModelError, RecipeError, TargetMissingError
from edgedyn.layers import canonicalize
from edgedyn.report import write_report
from edgedyn.validate import Outputs, Row, ValidationReport

if TYPE_CHECKING:
    from edgedyn.calibration import Sample
    from edgedyn.ops import Form, Op
    from edgedyn.recipe import Recipe
    from edgedyn.targets import Run, Target

Progress = Callable[[str, int, int], None]
_EXACT_SAMPLES = 1  # float64 comparison of whole networks; the rewrite does not depend on the image


@dataclass(frozen=True)
class Converted:
    """A recipe's network on its way to a target, after every step before lowering.

    ``reference`` is the user's network, ``expanded`` its exact rewrite in the chosen forms, ``quantized``
    that at the recipe's precision, and ``program`` what the target lowers.
    """

    reference: nn.Module
    forms: dict[Op, Form]
    expanded: ExportedProgram
    quantized: quantize.Quantized
    program: ExportedProgram


@dataclass(frozen=True)
class Build:
    """A finished build: the bundle, whether its checks passed, and what was measured.

    ``latency_ms`` is of this machine: median and 95th percentile of ``runs`` runs of one tile.
    """

    bundle: Bundle
    report: ValidationReport
    latency_ms: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return what ``edgedyn build --json`` prints."""
        manifest = self.bundle.manifest
        return {
            "ok": self.report.ok,
            "bundle": str(self.bundle.path),
            "target": self.bundle.target,
            "precision": self.bundle.precision,
            "forms": manifest["forms"],
            "int8_mac_share": manifest["facts"].get("int8_mac_share"),
            "rows": [row.to_json() for row in self.report.rows],
            "latency_ms": self.latency_ms,
            "files": {name: entry["size"] for name, entry in manifest["files"].items()},
        }


def build(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    trust: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Build:
    """Build the bundle ``out``; it appears whole, report included, or not at all.

    Args:
        recipe: what to build.
        out: the bundle's directory; refused when it exists, unless ``force``.
        force: replace a bundle that stands there.
        trust: allow weights that are a pickle of tensors.
        progress: called with (what is done, steps done, steps in all).

    Raises:
        EdgedynError: the narrowest kind, before anything is written where that can be known.
    """
    refuse_existing(out, force=force)
    target = load_target(recipe)
    calibration, samples = load_sets(recipe)
    converted = convert(recipe, target, calibration, samples[0], trust=trust, progress=progress)
    with staging_folder(out) as staging:
        progress("lower", 0, 1)
        artifact = target.lower(converted.program, staging, recipe.precision)
        run = target.load(staging / artifact.files[0])
        progress("lower", 1, 1)
        outputs = run_samples(converted, run, samples, recipe.precision, progress)
        rows = exactness_rows(converted, samples, recipe.limits.exact)
        rows += validate.share_rows(converted.quantized, recipe.precision, recipe.limits)
        rows += validate.arithmetic_rows(outputs, recipe.precision, recipe.limits)
        rows += validate.truth_rows(outputs, recipe.limits)
        rows += [validate.decision_row(converted.expanded), *artifact.rows]
        report = ValidationReport(tuple(rows))
        latency_ms = time_runs(run, samples[0].noisy.astype(recipe.input_spec().dtype))
        write_vectors(staging, outputs, recipe)
        quantized = converted.quantized
        manifest = describe(
            recipe, artifact, converted.forms, quantized, calibration, outputs, latency_ms, report.ok
        )
        write_texts(staging, recipe, report, quantized, calibration, latency_ms)
        write_report(
            staging,
            title=recipe.name,
            ok=report.ok,
            rows=[row.to_json() for row in rows],
            manifest=manifest,
            pictures=choose_pictures(outputs),
            facts={
                **manifest["facts"],
                "programs": {n: (staging / n).stat().st_size for n in artifact.files},
            },
        )
        bundle = write_bundle(out, staging, manifest, force=force)
    return Build(bundle, report, latency_ms)


def convert(
    recipe: Recipe,
    target: Target,
    calibration: CalibrationSet | None,
    example: Sample,
    *,
    trust: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Converted:
    """Bring the recipe's network to the program that the target lowers; nothing is written.

    Args:
        recipe: what to convert.
        target: where to, from ``load_target``.
        calibration: the set that INT8 observes; None for a float precision.
        example: an input of the recipe's shape, to export with.
        trust: allow weights that are a pickle of tensors.
        progress: called with (what is done, steps done, steps in all).
    """
    reference = recipe.load_model(trust=trust)
    progress("rewrite layers", 0, 1)
    inputs = (torch.from_numpy(example.noisy),)
    captured = capture(canonicalize(reference), inputs)
    forms = ops.choose_forms(captured, target, recipe.forms)
    expanded = ops.expand(captured, forms, "before_quantize")
    progress("rewrite layers", 1, 1)
    quantized = apply_precision(expanded, inputs, recipe, target, calibration, progress)
    program = ops.expand(quantized.program, forms, "after_quantize")
    return Converted(reference, forms, expanded, quantized, program)


def load_target(recipe: Recipe) -> Target:
    """Return the recipe's target, able to lower and run the recipe's precision here.

    Raises:
        RecipeError: for an unknown target or a precision that it does not have.
        TargetMissingError: when its packages are not installed.
    """
    target = targets.load(recipe.target)
    if recipe.precision not in target.precisions:
        raise RecipeError(
            f"target {target.name!r} has no precision {recipe.precision!r}; it has "
            f"{', '.join(sorted(target.precisions))}. Change precision in the recipe."
        )
    if reason := target.missing():
        raise TargetMissingError(f"target {target.name!r} is not available here: {reason}")
    return target


def load_sets(recipe: Recipe) -> tuple[CalibrationSet | None, list[Sample]]:
    """Open the calibration set (INT8 only) and draw the validation samples of a disjoint set.

    Raises:
        CalibrationError: when INT8 has no calibration set, a set is refused, or the two share a file.
    """
    validation = open_set(recipe.path(recipe.validation))
    calibration = None
    if recipe.precision == "int8":
        if recipe.calibration is None:
            raise CalibrationError(
                f"recipe {recipe.name!r} is INT8 and names no calibration set. Set calibration: to a "
                "manifest in calib/ or a folder of images; random data is never used."
            )
        calibration = open_set(recipe.path(recipe.calibration))
        refuse_overlap(calibration, validation)
    return calibration, list(validation.draw(tuple(recipe.input.shape)))


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export the network with fixed shapes; our ops stay single nodes.

    Raises:
        ModelError: when ``torch.export`` cannot follow it, with the exporter's first line.
    """
    try:
        return torch.export.export(model, inputs, strict=False)
    except Exception as error:  # torch.export raises its own, dynamo's and the model's exceptions alike
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"torch.export cannot capture {type(model).__name__} for inputs "
            f"{[tuple(x.shape) for x in inputs]}: {first}. A layer that branches on data needs a canonical "
            "form (edgedyn list layers), or the input shape does not fit (input.shape)."
        ) from error


def apply_precision(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    recipe: Recipe,
    target: Target,
    calibration: CalibrationSet | None,
    progress: Progress,
) -> quantize.Quantized:
    """Bring the expanded program to the recipe's precision."""
    if calibration is None:
        return quantize.to_float(program, inputs, recipe.precision)
    assert target.int8 is not None  # a target that lists int8 says how
    drawn = [(torch.from_numpy(sample.noisy),) for sample in calibration.draw(tuple(recipe.input.shape))]
    return quantize.to_int8(
        program,
        inputs,
        scheme=target.int8,
        section=recipe.quantize,
        samples=drawn,
        progress=lambda done, total: progress("calibrate", done, total),
    )


def exactness_rows(converted: Converted, samples: list[Sample], limit: float) -> list[Row]:
    """Prove the rewrite in float64: reference, canonical and expanded network on real images."""
    wide = copy.deepcopy(converted.reference).double()
    expanded = converted.expanded
    return validate.rewrite_rows(wide, canonicalize(wide), expanded, samples[:_EXACT_SAMPLES], limit)


def run_samples(
    converted: Converted,
    run: Run,
    samples: list[Sample],
    precision: str,
    progress: Progress,
) -> Outputs:
    """Run expanded, quantized and lowered program on every validation sample."""
    dtype = torch.float16 if precision == "fp16" else torch.float32
    modules = [
        ("expanded", converted.expanded.module(), torch.float32),
        ("quantized", converted.program.module(), dtype),
    ]
    results: list[list[np.ndarray]] = []
    for name, module, kind in modules:

        def in_torch(x: np.ndarray, module: nn.Module = module, kind: torch.dtype = kind) -> np.ndarray:
            with torch.no_grad():
                return np.asarray(module(torch.from_numpy(x).to(kind)).float().numpy())

        results.append(validate.run_all(in_torch, samples, name))
        progress("validate", len(results), 3)
    numpy_dtype = np.float16 if precision == "fp16" else np.float32
    results.append(validate.run_all(lambda x: run(x.astype(numpy_dtype))[0], samples, "device"))
    progress("validate", 3, 3)
    return Outputs(samples, *results)


def time_runs(run: Run, x: np.ndarray, *, runs: int = 10, warm_up: int = 2) -> dict[str, float]:
    """Time the program on one input on this machine; milliseconds."""
    times = []
    for index in range(warm_up + runs):
        start = time.perf_counter()
        run(x)
        if index >= warm_up:
            times.append((time.perf_counter() - start) * 1e3)
    return {"median": float(np.median(times)), "p95": float(np.percentile(times, 95)), "runs": runs}
