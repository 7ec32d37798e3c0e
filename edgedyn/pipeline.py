"""The straight line from a recipe to a bundle. Read this first.

    recipe -> model -> canonical -> captured -> decomposed -> quantized -> lowered -> validated -> bundle

Each line of ``build`` is a function of typed values and can be called alone. The router and the variants of a
routed network are programs that pass through the same steps; all of them share one bundle.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgedyn.bench.speed import machine, time_beside
from edgedyn.bundle.bundle import Bundle, refuse_existing, write_bundle
from edgedyn.bundle.dispatch import load_programs
from edgedyn.contents import describe, write_contents
from edgedyn.conversion import coverage, implicit
from edgedyn.conversion.calibration import Measurements
from edgedyn.conversion.capture import capture
from edgedyn.conversion.convert import convert, load_target
from edgedyn.conversion.counterparts import load_counterparts
from edgedyn.conversion.image_sets import draw, load_sets, open_sets
from edgedyn.conversion.network import rewrite_network
from edgedyn.device import programs
from edgedyn.device.session import runtime_name
from edgedyn.errors import RecipeError, UsageError
from edgedyn.files import refuse_unwritable, staging_folder
from edgedyn.graph.provenance import shared_provenance
from edgedyn.quantize.progress import Progress, silent
from edgedyn.quantize.table.table import refuse_place
from edgedyn.recipe.recipe import Recipe, as_recipe
from edgedyn.report.advice import advise
from edgedyn.report.beside import latency_rows
from edgedyn.report.rows import ValidationReport
from edgedyn.targets.onnxruntime.run import THREADS
from edgedyn.validation import checks, decisions
from edgedyn.validation.exactness import exactness_rows
from edgedyn.validation.further import further_rows
from edgedyn.validation.measurements import Case
from edgedyn.validation.runs import Outputs, run_samples

if TYPE_CHECKING:
    import numpy as np

    from edgedyn.conversion.convert import Converted
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.quantize.table.table import CalibrationTable
    from edgedyn.targets import Artifact, Target

__all__ = [
    "Build",
    "build",
    "calibrate",
    "capture",
    "convert",
    "load_sets",
    "load_target",
    "lower",
    "rewrite_network",
    "validate",
]


@dataclass(frozen=True)
class Build:
    """A finished build.

    Attributes:
        bundle: the directory.
        report: rows and verdict.
        latency_ms: median and 95th percentile (p95) of ``runs`` runs of one tile on this machine.
        latency_beside: median of the same tile, timed in turns with it: ``float32``, ``stock kernels`` or
            ``fused kernels`` -> milliseconds; see ``conversion.counterparts``.
    """

    bundle: Bundle
    report: ValidationReport
    latency_ms: dict[str, float]
    latency_beside: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line: the bundle, its checks and the latency; failed rows follow."""
        median = self.latency_ms["median"]
        return f"Build({self.bundle!r}, {median:.1f} ms per tile on this machine)\n{self.report!r}"

    @property
    def advice(self) -> list[dict[str, str]]:
        """The advice on each kind of failed check, ``{"row", "advice"}``."""
        return advise([row.to_json() for row in self.report.rows], self.bundle.manifest["facts"])

    def to_json(self) -> dict[str, Any]:
        """Return the output of ``edgedyn build --json``."""
        manifest = self.bundle.manifest
        return {
            "ok": self.report.ok,
            "bundle": str(self.bundle.path),
            "target": self.bundle.target,
            "precision": self.bundle.precision,
            "forms": manifest["forms"],
            "int8_mac_share": manifest["facts"].get("int8_mac_share"),
            "rows": [row.to_json() for row in self.report.rows],
            "advice": self.advice,
            "latency_ms": self.latency_ms,
            "latency_beside": self.latency_beside,
            "measured_on": manifest["facts"].get("measured_on", {}),
            "files": {name: entry["size"] for name, entry in manifest["files"].items()},
        }


@shared_provenance()
def build(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    calibration: CalibrationSet | None = None,
    force: bool = False,
    trust: bool = False,
    compare: bool = True,
    progress: Progress = silent,
) -> Build:
    """Build the bundle ``out``; it appears whole, report included, or not at all.

    Example:
        built = edgedyn.build("recipes/mallenet-s.phone.int8.yaml", "out")
        print(built.report.ok, built.latency_ms["median"])

    Args:
        recipe: a recipe, or the path of one.
        out: the bundle's directory; refused when it exists, unless ``force``.
        calibration: in place of the recipe's calibration set, for instance ``CalibrationSet.of(loader)``.
        force: replace a bundle at ``out``.
        trust: allow a network from anywhere, and weights that are a pickle of tensors.
        compare: also time the network in float32 and with the other kernels, where they run here.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        EdgedynError: the narrowest kind, before long work where possible.
    """
    recipe, out = as_recipe(recipe), Path(out)
    refuse_existing(out, force=force)
    refuse_unwritable(out, is_folder=True)
    target = load_target(recipe)
    calibration, validation = open_sets(recipe, calibration)
    network = rewrite_network(recipe, target, trust=trust, progress=progress)
    recipe = network.recipe
    samples = draw(recipe, validation)
    converted = convert(network, target, calibration, samples[0], force=force, progress=progress)
    with staging_folder(out) as staging:
        progress("lower", 0, 1)
        artifact = target.lower(converted.programs, staging, recipe.precision)
        device = load_programs(target.load, staging, artifact.programs, converted.routing)
        progress("lower", 1, 1)
        outputs = run_samples(converted, device, samples, recipe.precision, progress)
        report, margins = validate(recipe, target, converted, artifact, outputs)
        inputs = [x.astype(recipe.input_specs()[0].dtype) for x in samples[0].inputs]
        with TemporaryDirectory() as folder:
            others = load_counterparts(converted, target, Path(folder), progress) if compare else {}
            latency_ms, beside = time_beside(device, others, inputs)
        report = ValidationReport((*report.rows, *latency_rows(latency_ms, beside)))
        manifest = describe(recipe, artifact, converted, calibration, outputs, latency_ms, report.ok)
        manifest["facts"] |= {**margins, "measured_on": measured_on(target, staging, artifact, inputs)}
        manifest["facts"] |= {"latency_beside": beside} if beside else {}
        write_contents(staging, recipe, converted, outputs, report, manifest)
        bundle = write_bundle(out, staging, manifest, force=force)
    programs.remember(bundle, runtime_name(bundle))
    return Build(bundle, report, latency_ms, beside)


def validate(
    recipe: Recipe, target: Target, converted: Converted, artifact: Artifact, outputs: Outputs
) -> tuple[ValidationReport, dict[str, Any]]:
    """Compare every program with the one before it, and with the truth.

    Returns:
        The report, and the margins of decisions for the manifest's facts.
    """
    rounding, rows = exactness_rows(converted, outputs, precision=recipe.precision, limit=recipe.limits.exact)
    case = Case(
        outputs,
        converted.int8_shares,
        recipe.precision,
        recipe.sampling.measured_on(outputs.samples),
        checks.tighten_drop(recipe.limits, recipe.quantize.max_drop_db),
        rounding,
    )
    decided = decisions.measure(converted, target, case)
    rows += checks.rows(case)
    rows += further_rows(case)
    rows += coverage.rows(converted.table.coverage) if converted.table else []
    rows += [*decided.rows, *artifact.rows]
    rows = rows if recipe.is_trained else checks.report_only(rows)
    return ValidationReport(tuple(rows)), decided.facts


def measured_on(
    target: Target, folder: Path, artifact: Artifact, inputs: Sequence[np.ndarray]
) -> dict[str, str]:
    """Return where a latency was measured: tile, runtime, threads and machine."""
    run = importlib.import_module(f"edgedyn.targets.{target.name}.run")
    name_runtime = getattr(run, "runtime_name", lambda path: target.name)
    runtimes = sorted({name_runtime(folder / file) for file in artifact.programs.values()})
    own = any("ONNX Runtime" in name for name in runtimes)
    return {
        "tile": " x ".join(map(str, inputs[0].shape[2:])) + " pixels",
        "runtime": "; ".join(runtimes),
        "threads": f"{THREADS} threads" if own else "the runtime's own number of threads",
        "machine": machine(),
    }


@shared_provenance()
def lower(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    calibration: CalibrationSet | None = None,
    force: bool = False,
    trust: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Write only the target's programs into the new folder ``out``: no validation, no bundle.

    Example:
        artifact = edgedyn.lower("recipes/mallenet-s.phone.int8.yaml", "programs")
        print(artifact.programs)  # {"forward": "model.pte"}

    Args:
        recipe: a recipe, or the path of one.
        out: a folder that does not exist.
        calibration: in place of the recipe's calibration set.
        force: use the recipe's calibration table even if its key does not fit.
        trust: allow a network from anywhere, and weights that are a pickle of tensors.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        EdgedynError: the narrowest kind, as ``build``.
    """
    recipe, out = as_recipe(recipe), Path(out)
    refuse_existing(out)
    refuse_unwritable(out, is_folder=True)
    target = load_target(recipe)
    calibration, validation = open_sets(recipe, calibration)
    network = rewrite_network(recipe, target, trust=trust, progress=progress)
    recipe = network.recipe
    samples = draw(recipe, validation)
    converted = convert(network, target, calibration, samples[0], force=force, progress=progress)
    with staging_folder(out) as staging:
        progress("lower", 0, 1)
        artifact = target.lower(converted.programs, staging, recipe.precision)
        progress("lower", 1, 1)
        staging.rename(out)
    return artifact


def calibrate(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    calibration: CalibrationSet | None = None,
    cache: str | Path | None = None,
    force: bool = False,
    trust: bool = False,
    sensitivity: bool = False,
    ablation: bool = False,
    progress: Progress = silent,
) -> CalibrationTable:
    """Write the calibration table of an INT8 recipe, whole or not at all; nothing is lowered.

    Example:
        table = edgedyn.calibrate("recipes/mallenet-s.phone.int8.yaml", "table.json")

    Args:
        recipe: a recipe of precision int8, or the path of one; the table that it names is ignored.
        out: the table, a JSON file; weights that calibration changes stand beside it as safetensors.
        calibration: in place of the recipe's calibration set.
        cache: folder for TensorRT's calibration cache and its float ONNX, see ``conversion.implicit``.
        force: replace existing files.
        trust: allow a network from anywhere, and weights that are a pickle of tensors.
        sensitivity: measure the cost of INT8 in each layer, for ``CalibrationTable.precision``.
        ablation: measure INT8 with each switch of the method set the other way, for
            ``CalibrationTable.ablation``.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        RecipeError: for another precision than int8; with ``cache``, for another target than tensorrt or for
            fused kernels.
        UsageError: when ``out`` exists or ``cache`` is not empty, unless ``force``; when ``out`` is no .json
            file in an existing folder; when ``cache`` is a file.
    """
    recipe, out = as_recipe(recipe), Path(out)
    if recipe.precision != "int8":
        raise RecipeError(
            f"recipe {recipe.name!r} has precision {recipe.precision!r}; only int8 has a calibration table. "
            "Set precision: int8."
        )
    refuse_place(out)
    if os.path.exists(out) and not force:
        raise UsageError(f"{out} exists. Choose another name, or pass --force to replace it.")
    refuse_unwritable(out)
    if cache is not None:
        implicit.refuse_caches(recipe, Path(cache), force=force)
    fresh = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"table": None})})
    target = load_target(fresh, ablates=ablation)
    calibration, validation = open_sets(fresh, calibration)
    network = rewrite_network(fresh, target, trust=trust, progress=progress)
    samples = draw(network.recipe, validation)
    measure = Measurements(sensitivity, ablation)
    converted = convert(network, target, calibration, samples[0], measure=measure, progress=progress)
    assert converted.table is not None  # INT8 has one
    converted.table.write(out)
    if cache is not None:
        implicit.write_caches(network.recipe, converted, Path(cache))
    return converted.table
