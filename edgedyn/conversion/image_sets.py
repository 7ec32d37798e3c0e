"""The image sets of a recipe: opened with its values, refused where they do not fit, and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor

from edgedyn.bundle.tensors import GUIDE, NOISE_LEVEL, PICTURE, encode_inputs
from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.images.disjoint import refuse_other_clipping, refuse_overlap
from edgedyn.images.image_set import CalibrationSet, open_set
from edgedyn.images.noise import NoiseSection
from edgedyn.images.tasks import TASKS
from edgedyn.sections import explain

if TYPE_CHECKING:
    from edgedyn.images.sample import Sample
    from edgedyn.recipe.recipe import Recipe


def load_sets(
    recipe: Recipe, calibration: CalibrationSet | None = None
) -> tuple[CalibrationSet | None, list[Sample]]:
    """Open the calibration set, and draw the samples of the validation set; as ``open_sets`` and ``draw``."""
    calibration, validation = open_sets(recipe, calibration)
    return calibration, draw(recipe, validation)


def open_sets(
    recipe: Recipe, calibration: CalibrationSet | None = None
) -> tuple[CalibrationSet | None, CalibrationSet]:
    """Open the calibration set and a disjoint validation set; no image is decoded.

    Args:
        recipe: names both sets; its values take the place of theirs.
        calibration: in place of the recipe's set.

    Raises:
        CalibrationError: when INT8 has no calibration set, a set is refused or has too few images, the two
            share an image or differ in their clipping rule, only some noisy photos of the validation set
            have a clean one, or the fine-tuning images are refused.
        RecipeError: when the recipe's noise level is not valid for a set.
    """
    validation = _open(recipe, recipe.validation)
    source = recipe.calibration if calibration is None else calibration
    if source is None and recipe.precision == "int8":
        raise CalibrationError(
            f"recipe {recipe.name!r} is INT8 and names no calibration set. Set calibration: to a "
            "manifest in calib/ or a folder of images; random data is never used."
        )
    if source is not None:
        method = recipe.quantize
        calibration = _open(recipe, source, method.samples, method.color_augmented)
        _refuse_unfit(calibration, validation)
    lacks = [image.path.name for image in validation.images if image.clean is None]
    if (
        TASKS[recipe.task].has_truth
        and validation.noise.kind == "real"
        and 0 < len(lacks) < len(validation.images)
    ):
        raise CalibrationError(
            f"validation set {validation.name!r} has {len(lacks)} noisy photos without a clean file, such as "
            f"{lacks[0]}, and {len(validation.images) - len(lacks)} with one; expected one for all, to "
            "measure PSNR, or for none, to compare with the float network. Complete the manifest, or split "
            "the set."
        )
    if recipe.precision == "int8":
        open_finetuning(recipe)  # refused before long work
    return calibration, validation


def open_finetuning(recipe: Recipe) -> CalibrationSet | None:
    """Open the image set that the recipe names for fine-tuning; None where it names none.

    Raises:
        CalibrationError: when it is refused, shares an image with the validation set, or clips otherwise.
    """
    if recipe.quantize.finetune_images is None:
        return None
    images = _open(recipe, recipe.quantize.finetune_images)
    _refuse_unfit(images, _open(recipe, recipe.validation))
    return images


def _open(
    recipe: Recipe, source: str | CalibrationSet, samples: int | None = None, color_augmented: int = 0
) -> CalibrationSet:
    """Open a set of the recipe, or take one from Python, with the recipe's values."""
    noise = recipe.sets_noise
    try:
        if isinstance(source, CalibrationSet):
            return source.with_values(noise=noise, samples=samples, color_augmented=color_augmented)
        path = recipe.path(source)
        return open_set(path, noise=noise, samples=samples, color_augmented=color_augmented)
    except ValidationError as error:
        raise RecipeError(f"model.arguments.sigma: {explain(error, NoiseSection)}") from error


def draw(recipe: Recipe, images: CalibrationSet) -> list[Sample]:
    """Draw the samples of a set, with the values that the recipe's network takes."""
    return list(draw_each(recipe, images))


def draw_each(recipe: Recipe, images: CalibrationSet) -> Iterator[Sample]:
    """Yield the samples of a set one by one.

    Raises:
        CalibrationError: as ``CalibrationSet.draw``; for photos of an unknown noise level, where an input of
            the network is that level.
    """
    specs = recipe.input_specs()
    levels = [spec.name for spec in specs if spec.role == NOISE_LEVEL]
    if levels and images.noise.kind == "real" and not images.has_truth:
        raise CalibrationError(
            f"the input {levels[0]!r} is the noise level, and the set {images.name!r} has noisy photos "
            "without clean ones, whose level is unknown. Add clean: to the manifest, or give the input a "
            "value: in the recipe's inputs:."
        )
    pictures = [spec.shape for spec in specs if spec.role in (PICTURE, GUIDE)]
    for sample in images.draw(pictures, recipe.sampling):
        inputs = encode_inputs(specs, sample.inputs, sample.sigma)
        yield replace(sample, inputs=inputs, picture=sample.noisy)


def draw_more(recipe: Recipe, images: CalibrationSet) -> list[Sample]:
    """Draw samples for fine-tuning, with crops and noise that no other step uses."""
    return draw(recipe, images.fresh(2))


def to_tensors(sample: Sample) -> tuple[Tensor, ...]:
    """Return a sample's inputs as tensors."""
    return tuple(torch.from_numpy(x) for x in sample.inputs)


def _refuse_unfit(images: CalibrationSet, validation: CalibrationSet) -> None:
    refuse_overlap(images, validation)
    refuse_other_clipping(images, validation)
