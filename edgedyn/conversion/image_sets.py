"""The image sets of a recipe: opened, with its noise, refused where they cannot be right, and drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgedyn.errors import CalibrationError
from edgedyn.images.image_set import (
    MOST_SAMPLES,
    CalibrationSet,
    open_set,
    refuse_other_clipping,
    refuse_overlap,
)
from edgedyn.images.tasks import TASKS

if TYPE_CHECKING:
    from edgedyn.images.image_set import Sample
    from edgedyn.recipe.recipe import Recipe


def load_sets(
    recipe: Recipe, calibration: CalibrationSet | None = None
) -> tuple[CalibrationSet | None, list[Sample]]:
    """Open the calibration set, and draw the validation samples of a disjoint set.

    Args:
        recipe: names the sets; its noise, or the level that its network is told, takes the place of theirs.
        calibration: in place of the recipe's.

    Raises:
        CalibrationError: when INT8 has no calibration set, a set is refused or has too few images, or the two
            share an image or differ in their clipping rule.
    """
    validation = _with_noise(recipe, open_set(recipe.path(recipe.validation)))
    asked = recipe.quantize.samples
    if calibration is None and recipe.calibration is not None:
        calibration = open_set(recipe.path(recipe.calibration), most=max(MOST_SAMPLES, asked or 0))
    if calibration is None and recipe.precision == "int8":
        raise CalibrationError(
            f"recipe {recipe.name!r} is INT8 and names no calibration set. Set calibration: to a "
            "manifest in calib/ or a folder of images; random data is never used."
        )
    if calibration is not None:
        calibration = _with_noise(recipe, calibration)
        _refuse_unfit(calibration, validation)
        calibration = calibration if asked is None else calibration.take(asked)
        calibration = calibration.with_color_augmented(recipe.quantize.color_augmented)
    task = TASKS[recipe.task]
    if task.has_truth and not validation.has_truth:
        raise CalibrationError(
            f"validation set {validation.name!r} has noisy photos without a clean file; a task "
            f"{recipe.task!r} is judged by the clean one. Add clean: to the manifest, or name another set."
        )
    return calibration, draw(recipe, validation)


def open_finetuning(recipe: Recipe) -> CalibrationSet | None:
    """Open the set that the recipe fine-tunes on, where it names one.

    Raises:
        CalibrationError: when it is refused, shares an image with the validation set, or clips otherwise.
    """
    if recipe.quantize.finetune_images is None:
        return None
    names = (recipe.quantize.finetune_images, recipe.validation)
    images, validation = (_with_noise(recipe, open_set(recipe.path(name))) for name in names)
    _refuse_unfit(images, validation)
    return images


def draw(recipe: Recipe, images: CalibrationSet) -> list[Sample]:
    """Draw the samples of a set for the recipe's inputs."""
    return list(images.draw(recipe.input_shapes(), TASKS[recipe.task]))


def draw_more(recipe: Recipe, images: CalibrationSet) -> list[Sample]:
    """Draw crops and noise that nothing else saw, to fine-tune on."""
    return draw(recipe, images.fresh(2))


def to_tensors(sample: Sample) -> tuple[Tensor, ...]:
    """Return a sample's inputs as tensors."""
    return tuple(torch.from_numpy(x) for x in sample.inputs)


def _with_noise(recipe: Recipe, images: CalibrationSet) -> CalibrationSet:
    return images.with_noise(recipe.choose_noise(images.noise))


def _refuse_unfit(images: CalibrationSet, validation: CalibrationSet) -> None:
    refuse_overlap(images, validation)
    refuse_other_clipping(images, validation)
