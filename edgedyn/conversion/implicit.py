"""Calibration caches of a recipe, for TensorRT's implicit INT8 (without Q/DQ nodes), up to version 10.

    FOLDER/model.onnx    float; the weights that calibration chose
    FOLDER/model.cache   scales of its values

A routed network has both for each program; a program without INT8 layers has no cache. Without Q/DQ nodes a
layer runs in INT8 only where its output has a scale, too. So, unlike the Q/DQ model of the same target, the
cache also has the outputs of INT8 layers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgedyn import ops, quantize
from edgedyn.errors import RecipeError, UsageError
from edgedyn.files import make_folder, refuse_unwritable, replace_files
from edgedyn.layers import float32_classes
from edgedyn.targets import Int8Scheme

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgedyn.conversion.convert import Converted, Part
    from edgedyn.recipe.recipe import Recipe

_SCHEME = Int8Scheme(symmetric=True, outputs=True)


def refuse_caches(recipe: Recipe, folder: Path, *, force: bool = False) -> None:
    """Refuse a recipe without calibration caches, or a folder with other files; call it before long work.

    Raises:
        RecipeError: for another target, for our kernels, which take explicit INT8 only, or for shifted
            activations, which the float ONNX file does not have.
        UsageError: when ``folder`` is a file or not empty.
    """
    if (recipe.target, recipe.kernels) != ("tensorrt", "stock"):
        raise RecipeError(
            f"a calibration cache is for target tensorrt with stock kernels; recipe {recipe.name!r} has "
            f"target {recipe.target!r} and kernels {recipe.kernels!r}. Take the network's Jetson recipe, or "
            "set kernels: stock."
        )
    if recipe.quantize.shift:
        raise RecipeError(
            f"recipe {recipe.name!r} has quantize.shift: true; expected false for a calibration cache, whose "
            "float ONNX file has no shifted activations. Pass --set quantize.shift=false."
        )
    if os.path.exists(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is no folder; calibration caches go into one. Choose another name.")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise UsageError(
            f"{folder} is not empty. Choose another folder, or pass --force to replace its files."
        )
    refuse_unwritable(folder / "model.onnx")


def write_caches(recipe: Recipe, converted: Converted, folder: Path) -> list[Path]:
    """Write a float ONNX per program and, where it has INT8 layers, its calibration cache; return the files.

    The old cache is deleted first and the new one written last, so that no cache ever lies beside the ONNX
    file of another calibration.
    """
    from edgedyn.targets.onnxruntime.lower import file_name, write_models
    from edgedyn.targets.tensorrt.calibration_cache import cache_text, split_pairs

    programs = {name: _with_outputs(recipe, part) for name, part in converted.parts.items()}
    with tempfile.TemporaryDirectory() as scratch:
        models = write_models(programs, Path(scratch), "int8")
    make_folder(folder)
    written: list[Path] = []
    for name, model in models.items():
        made, scales = split_pairs(model)
        path = folder / file_name(name)
        cache = path.with_suffix(".cache")
        cache.unlink(missing_ok=True)
        files = {path: made.SerializeToString(deterministic=True)}
        if scales:
            files[cache] = cache_text(scales).encode()
        replace_files(files)
        written += files
    return written


def _with_outputs(recipe: Recipe, part: Part) -> ExportedProgram:
    """Return a part with a Q/DQ pair at every input and output of INT8 layers."""
    assert part.quantized.calibrated is not None  # INT8 has one
    method = quantize.Int8Method(_SCHEME, recipe.quantize, float32_classes())
    quantized = quantize.apply(part.decomposed, part.inputs, part.quantized.calibrated, method)
    return ops.decompose(quantized.program, part.forms, "after_quantize")
