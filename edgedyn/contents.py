"""Contents of a bundle beside its program: vectors, manifest, recipe, rows, calibration table, page.

    vectors/        the first and the noisiest sample, with the outputs of the quantized program
    manifest        tensors, forms, versions, digests, measured facts; ``bundle.bundle`` adds the files
    recipe.yaml, report.json, report.html, calibration.json and .safetensors

All of it comes from measurements of the build; no program runs here.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn.bundle.manifest import FORMAT, FORWARD, ROUTER
from edgedyn.files import to_json
from edgedyn.report import Picture, write_report
from edgedyn.report.advice import advise
from edgedyn.report.rows import ValidationReport
from edgedyn.validation.runs import Outputs, enlarge, to_hwc

if TYPE_CHECKING:
    from edgedyn.conversion.convert import Converted, Part
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.quantize.table.table import CalibrationTable
    from edgedyn.recipe.keys import QuantizeSection
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Artifact


# The limits of a vector are never below these: a quarter of an 8-bit level at any pixel, a sixteenth in rms,
# which nobody sees.
LEAST_MAX_ABS = 1 / 255 / 4
LEAST_RMS = 1 / 255 / 16


def write_contents(
    staging: Path,
    recipe: Recipe,
    converted: Converted,
    outputs: Outputs,
    report: ValidationReport,
    manifest: dict[str, Any],
) -> None:
    """Write every file beside the program: vectors, recipe, rows, calibration table, page.

    Args:
        staging: the bundle's folder, with its programs.
        recipe: the recipe of the build.
        converted: the converted network; its calibration table is written.
        outputs: the outputs of every program.
        report: rows and verdict.
        manifest: the result of ``describe``, with every fact.
    """
    task = recipe.sampling.measured_on(outputs.samples)
    write_vectors(staging, outputs, recipe.dtype)
    write_texts(staging, recipe, report, converted.table, manifest["facts"])
    files = sorted(set(manifest["programs"].values()))
    write_report(
        staging,
        title=recipe.name,
        ok=report.ok,
        rows=[row.to_json() for row in report.rows],
        manifest=manifest,
        pictures=choose_pictures(outputs) if task.has_truth else [],
        facts={**manifest["facts"], "programs": {n: (staging / n).stat().st_size for n in files}},
    )


def write_vectors(staging: Path, outputs: Outputs, dtype: str) -> None:
    """Write the first and the noisiest sample, with the outputs of the quantized program for them."""
    (staging / "vectors").mkdir()
    for name, index in _vector_indices(outputs).items():
        for file, x in zip(_input_names(name, outputs), outputs.samples[index].inputs, strict=True):
            np.save(staging / file, x.astype(dtype))
        returned = outputs.returned["quantized"][index]
        for file, y in zip(_output_names(name, outputs), returned, strict=True):
            np.save(staging / file, y.astype(dtype))


def _input_names(vector: str, outputs: Outputs) -> list[str]:
    return _numbered(f"vectors/{vector}.input", len(outputs.samples[0].inputs))


def _output_names(vector: str, outputs: Outputs) -> list[str]:
    return _numbered(f"vectors/{vector}.output", len(outputs.specs))


def _numbered(stem: str, count: int) -> list[str]:
    return [f"{stem}{'' if count == 1 else i}.npy" for i in range(count)]


def _vector_indices(outputs: Outputs) -> dict[str, int]:
    noisiest = max(range(len(outputs.samples)), key=lambda i: outputs.samples[i].sigma)
    return {"first": 0, "noisiest": noisiest}


def describe(
    recipe: Recipe,
    artifact: Artifact,
    converted: Converted,
    calibration: CalibrationSet | None,
    outputs: Outputs,
    latency_ms: dict[str, float],
    ok: bool,
) -> dict[str, Any]:
    """Assemble the manifest; ``write_bundle`` adds the files and their digests."""
    routing = converted.routing
    facts: dict[str, Any] = {
        **artifact.facts,
        "latency_ms": latency_ms,
        "weights": _origin(recipe, converted),
    }
    facts["dynamic_layers"] = list(converted.dynamic_layers)
    if recipe.precision == "int8" and calibration is not None:
        facts["int8_mac_share"] = min(part.quantized.int8_mac_share for part in _variants(converted))
        facts["float_nodes"] = _float_nodes(converted)
        every = (name for part in converted.parts.values() for name in part.quantized.dynamic)
        facts["dynamic_ranges"] = list(dict.fromkeys(every))
        if converted.table is not None:
            table = converted.table
            facts["precision"] = {name: measured.to_json() for name, measured in table.precision.items()}
            facts["ablation"] = {name: dict(measured) for name, measured in table.ablation.items()}
        facts["calibration"] = _describe_calibration(recipe.quantize, calibration, converted.mismatch)
        facts["generated_kernels"] = _generated_kernels(converted)
        if notes := _notes(converted):
            facts["notes"] = notes
    task = recipe.sampling
    if task.has_truth and not task.measured_on(outputs.samples).has_truth:
        facts["truth"] = (
            "The validation photos are noisy and have no clean ones: no truth was there, so that no PSNR is "
            "known. The device is compared with the float network."
        )
    if converted.capacities is not None:
        facts["capacities"] = converted.capacities
    return {
        "format": FORMAT,
        "ok": ok,
        "name": recipe.name,
        "edgedyn": version("edgedyn"),
        "target": recipe.target,
        "precision": recipe.precision,
        "programs": dict(artifact.programs),
        "routing": routing.to_json() if routing else {},
        "inputs": [spec.to_json() for spec in recipe.input_specs()],
        "outputs": [spec.to_json() for spec in outputs.specs],
        **({"predictions": _predictions(recipe.task, outputs)} if task.predictions is not None else {}),
        "forms": {op.name: form.name for op, form in converted.forms.items()},
        "tile": {"overlap": recipe.tile.overlap},
        "versions": {name: version(name) for name in _tools(recipe)},
        "digests": {
            "recipe": recipe.digest(),
            "weights": recipe.weights_digest(),
            "calibration": calibration.digest() if calibration else "",
        },
        "facts": facts,
        "vectors": _describe_vectors(outputs),
    }


def _predictions(task: str, outputs: Outputs) -> dict[str, Any]:
    """Return how an app frames a photo, as validation did, and the names of the classes."""
    sample = outputs.samples[0]
    return {"task": task, "short_side": sample.short_side or 0, "classes": list(sample.classes)}


def _origin(recipe: Recipe, converted: Converted) -> str:
    if recipe.is_trained:
        notes = "".join(f"; {note}" for note in getattr(converted.reference, "weights_notes", ()))
        return f"trained: {Path(str(recipe.model.weights)).name}{notes}"
    return f"not trained: initial values of seed {recipe.model.seed}, BatchNorm statistics of real images"


def _generated_kernels(converted: Converted) -> dict[str, dict[str, float]]:
    """Return the dependence of each generated kernel on the image, by program and layer."""
    programs = converted.table.programs if converted.table is not None else {}
    return {
        entry.name if program == FORWARD else f"{program}: {entry.name}": {
            "spread": entry.spread[0],
            "between_images": entry.spread[1],
        }
        for program, entries in programs.items()
        for entry in entries
        if entry.spread
    }


def _notes(converted: Converted) -> dict[str, str]:
    """Return the notes of the calibration, by program and tensor: outliers, layers rounded to nearest."""
    programs = converted.table.programs if converted.table is not None else {}
    return {
        entry.name if program == FORWARD else f"{program}: {entry.name}": entry.note
        for program, entries in programs.items()
        for entry in entries
        if entry.note
    }


def _variants(converted: Converted) -> list[Part]:
    return [part for name, part in converted.parts.items() if name != ROUTER]


def _float_nodes(converted: Converted) -> list[dict[str, Any]]:
    """List the float nodes of every program, under the program's name where there are several."""
    return [
        {**row, "node": row["node"] if name == FORWARD else f"{name}: {row['node']}"}
        for name, part in converted.parts.items()
        for row in part.quantized.float_nodes
    ]


def _tools(recipe: Recipe) -> tuple[str, ...]:
    """Return the packages that a program depends on; NNCF only where it corrects biases."""
    always = ("torch", "executorch", "torchao", "onnx", "numpy")
    return always if recipe.quantize.bias_correction == "none" else (*always, "nncf")


def _describe_calibration(
    method: QuantizeSection, calibration: CalibrationSet, mismatch: str
) -> dict[str, Any]:
    return {
        "set": calibration.name,
        "licence": calibration.licence,
        "images": len(calibration.images),
        "samples": calibration.samples,
        "color_augmented": calibration.color_augmented,
        "noise": calibration.noise.to_json(),
        "ranges": method.ranges.model_dump(),
        "generated": method.generated,
        "equalized": method.equalize,
        "rounding": method.rounding,
        "bias_correction": method.bias_correction,
        **({"short_side": calibration.short_side} if calibration.short_side is not None else {}),
        **({"forced": mismatch} if mismatch else {}),
    }


def _describe_vectors(outputs: Outputs) -> list[dict[str, Any]]:
    vectors = []
    for name, index in _vector_indices(outputs).items():
        # another CPU, compiler or GPU rounds differently: allow twice the error of this runtime
        pairs = zip(outputs.returned["device"][index], outputs.returned["quantized"][index], strict=True)
        errors = [np.abs(y.astype(np.float64) - reference) for y, reference in pairs]
        units = [float(spec.scale_and_offset(np.dtype(float))[0].max()) for spec in outputs.specs]
        vectors.append(
            {
                "inputs": _input_names(name, outputs),
                "outputs": _output_names(name, outputs),
                "max_abs": [
                    max(2 * float(error.max()), LEAST_MAX_ABS * unit)
                    for error, unit in zip(errors, units, strict=True)
                ],
                "rms": [
                    max(2 * float(np.sqrt(np.mean(error**2))), LEAST_RMS * unit)
                    for error, unit in zip(errors, units, strict=True)
                ],
            }
        )
    return vectors


def write_texts(
    staging: Path,
    recipe: Recipe,
    report: ValidationReport,
    table: CalibrationTable | None,
    facts: dict[str, Any],
) -> None:
    """Write the recipe, the rows and, for INT8, the calibration table."""
    (staging / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    rows = [row.to_json() for row in report.rows]
    values = {"ok": report.ok, "rows": rows, "advice": advise(rows, facts)}
    _write_json(
        staging / "report.json",
        {
            **values,
            "latency_ms": facts["latency_ms"],
            "latency_beside": facts.get("latency_beside", {}),
            "measured_on": facts.get("measured_on", {}),
        },
    )
    if table is not None:
        table.write(staging / "calibration.json")


def _write_json(path: Path, values: object) -> None:
    path.write_text(to_json(values), encoding="utf-8")


def choose_pictures(outputs: Outputs, most: int = 3) -> list[Picture]:
    """Choose a sample of each noise level, ``most`` at most, from different images where the set has them."""
    chosen: dict[float, int] = {}
    sources: set[str] = set()
    for index, sample in enumerate(outputs.samples):
        if sample.sigma not in chosen and (sample.source not in sources or len(sources) >= most):
            chosen[sample.sigma] = index
            sources.add(sample.source)
    for index, sample in enumerate(outputs.samples):
        chosen.setdefault(sample.sigma, index)
    return [
        Picture(
            caption=outputs.samples[i].source,
            sigma=sigma,
            noisy=to_hwc(enlarge(outputs.samples[i])),
            float_=to_hwc(outputs.decomposed[i]),
            device=to_hwc(outputs.device[i]),
            truth=to_hwc(outputs.samples[i].truth),
        )
        for sigma, i in sorted(chosen.items())[:most]
    ]
