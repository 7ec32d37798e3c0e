"""What goes into a bundle beside its program: vectors, manifest, texts for people and programs, pictures.

    vectors/        the first and the noisiest sample, with what the quantized program makes of them
    manifest        tensors, forms, versions, digests, measured facts; ``edgedyn.bundle`` adds the files
    recipe.yaml, report.json, calibration.json

Everything is read from what the build measured; nothing is run here.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn.files import to_json
from edgedyn.report import Picture
from edgedyn.validate import Outputs, ValidationReport

if TYPE_CHECKING:
    from edgedyn.calibration import CalibrationSet
    from edgedyn.ops import Form, Op
    from edgedyn.quantize import Quantized
    from edgedyn.recipe import Recipe
    from edgedyn.targets import Artifact


def write_vectors(staging: Path, outputs: Outputs, recipe: Recipe) -> None:
    """Write the first and the noisiest sample, with what the quantized program makes of them."""
    (staging / "vectors").mkdir()
    dtype = recipe.input_spec().dtype
    for name, index in _vector_indices(outputs).items():
        np.save(staging / f"vectors/{name}.input.npy", outputs.samples[index].noisy.astype(dtype))
        expected = outputs.quantized[index].transpose(2, 0, 1)[None]
        np.save(staging / f"vectors/{name}.output.npy", np.ascontiguousarray(expected, dtype=dtype))


def _vector_indices(outputs: Outputs) -> dict[str, int]:
    noisiest = max(range(len(outputs.samples)), key=lambda i: outputs.samples[i].sigma)
    return {"first": 0, "noisiest": noisiest}


def describe(
    recipe: Recipe,
    artifact: Artifact,
    forms: dict[Op, Form],
    quantized: Quantized,
    calibration: CalibrationSet | None,
    outputs: Outputs,
    latency_ms: dict[str, float],
    ok: bool,
) -> dict[str, Any]:
    """Assemble the manifest; files and digests of files are added when the bundle is written."""
    spec = recipe.input_spec()
    facts: dict[str, Any] = {**artifact.facts, "latency_ms": latency_ms}
    if calibration is not None:
        facts["int8_mac_share"] = quantized.int8_mac_share
        facts["float_nodes"] = list(quantized.float_nodes)
        facts["calibration"] = _describe_calibration(recipe, calibration)
    return {
        "format": 1,
        "ok": ok,
        "name": recipe.name,
        "edgedyn": version("edgedyn"),
        "target": recipe.target,
        "precision": recipe.precision,
        "program": artifact.files[0],
        "inputs": [{**asdict(spec), "shape": list(spec.shape)}],
        "outputs": [{**asdict(replace(spec, name="output")), "shape": list(spec.shape)}],
        "forms": {op.name: form.name for op, form in forms.items()},
        "tile": {"overlap": recipe.tile.overlap},
        "versions": {
            name: version(name) for name in ("torch", "executorch", "torchao", "nncf", "onnx", "numpy")
        },
        "digests": {
            "recipe": recipe.digest(),
            "weights": recipe.weights_digest(),
            "calibration": calibration.digest() if calibration else "",
        },
        "facts": facts,
        "vectors": _describe_vectors(outputs),
    }


def _describe_calibration(recipe: Recipe, calibration: CalibrationSet) -> dict[str, Any]:
    return {
        "set": calibration.name,
        "licence": calibration.licence,
        "images": len(calibration.files),
        "samples": calibration.samples,
        "noise": calibration.noise.model_dump(),
        "engine": recipe.quantize.engine,
        "bias_correction": recipe.quantize.bias_correction if recipe.quantize.engine == "nncf" else "none",
    }


def _describe_vectors(outputs: Outputs) -> list[dict[str, Any]]:
    vectors = []
    for name, index in _vector_indices(outputs).items():
        # another CPU, compiler or GPU rounds otherwise: twice what this runtime was off, and at least a
        # quarter of an 8-bit level at a pixel, a sixteenth over the image
        error = np.abs(outputs.device[index].astype(np.float64) - outputs.quantized[index])
        vectors.append(
            {
                "input": f"vectors/{name}.input.npy",
                "output": f"vectors/{name}.output.npy",
                "max_abs": max(2 * float(error.max()), 1 / 255 / 4),
                "rms": max(2 * float(np.sqrt(np.mean(error**2))), 1 / 255 / 16),
            }
        )
    return vectors


def write_texts(
    staging: Path,
    recipe: Recipe,
    report: ValidationReport,
    quantized: Quantized,
    calibration: CalibrationSet | None,
    latency_ms: dict[str, float],
) -> None:
    """Write the recipe, the rows and the calibration table, for people and programs."""
    (staging / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    rows = {"ok": report.ok, "rows": [row.to_json() for row in report.rows], "latency_ms": latency_ms}
    _write_json(staging / "report.json", rows)
    table: dict[str, Any] = {"set": None, "tensors": []}
    if calibration is not None:
        table = {
            "set": calibration.name,
            "digest": calibration.digest(),
            "files": [{"name": path.name, "sha256": digest} for path, digest in calibration.files],
            "tensors": list(quantized.table),
        }
    _write_json(staging / "calibration.json", table)


def _write_json(path: Path, values: object) -> None:
    path.write_text(to_json(values), encoding="utf-8")


def choose_pictures(outputs: Outputs, most: int = 3) -> list[Picture]:
    """Choose a sample of each noise level, from different images where the set has them."""
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
            noisy=outputs.samples[i].noisy[0].transpose(1, 2, 0),
            float_=outputs.expanded[i],
            device=outputs.device[i],
            truth=outputs.samples[i].truth[0].transpose(1, 2, 0),
        )
        for sigma, i in sorted(chosen.items())[:most]
    ]
