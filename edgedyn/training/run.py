"""Run a training recipe: networks, images, log, held-out PSNR; resumed from its checkpoint.

<checkpoints>/checkpoint.pt     weights, averaged weights, optimizer
<checkpoints>/log.csv           step, loss, learning rate, seconds
<checkpoints>/validation.csv    step and PSNR in dB of the averaged weights, one column per set and level
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgedyn.checkpoints.weights import fit_state, load_weights
from edgedyn.errors import TrainingError
from edgedyn.images import metrics
from edgedyn.images.crops import augment_colors
from edgedyn.recipe.factory import make_network
from edgedyn.recipe.networks import find_network
from edgedyn.training.denoise import TrainingPlan, denoise, learning_rate, load_images, patches, train
from edgedyn.training.distill import Distillation
from edgedyn.training.recipe import NetworkSection, TrainingRecipe, ValidationSection
from edgedyn.training.slicing import speed_up
from edgedyn.training.surgery import cut_channels


@dataclass(frozen=True)
class Result:
    """The averaged weights of a step.

    Attributes:
        step: number of steps that made them.
        seconds: time of all runs together.
        network: the averaged network.
        psnr_db: its PSNR by ``set sigma=level``.
        teacher_psnr_db: the teacher's.
    """

    step: int
    seconds: float
    network: nn.Module
    psnr_db: dict[str, float]
    teacher_psnr_db: dict[str, float]


@dataclass
class Table:
    """A CSV file of rows that begin with a step; a resumed run drops the rows that it repeats.

    Attributes:
        path: the file; made with its header where there is none.
        columns: names of the columns, the first one is the step.
        rows: the rows of the file, as text.
    """

    path: Path
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(self.columns)]
        self._write()

    def append(self, step: int, *values: object) -> None:
        """Write a row at once; later rows and another one of the step are dropped."""
        row = [str(value) for value in (step, *values)]
        if self.rows and int(self.rows[-1][0]) >= step:
            self.rows = self.until(step)
            self._write()
        self.rows.append(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def until(self, step: int) -> list[list[str]]:
        """Return the rows before a step."""
        return [row for row in self.rows if int(row[0]) < step]

    def last(self, *, before: int, column: int) -> float:
        """Return the value of a column in the last row before a step, 0 where there is none."""
        return float([["0"] * len(self.columns), *self.until(before)][-1][column])

    def _write(self) -> None:
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])


class Watch:
    """The ``report`` of ``train``: a row of the log per step, the PSNR from time to time.

    Args:
        recipe: the training recipe.
        sets: validation images by name, each (1, C, H, W) in [0, 1].
        teacher: the teacher, in evaluation mode.
        folder: folder of the tables.
        save: called after every measurement. The validation images choose no weights: they would no longer
            be held out.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        sets: dict[str, list[Tensor]],
        teacher: nn.Module,
        folder: Path,
        save: Callable[[Result], None],
    ) -> None:
        self.recipe, self.sets, self.save = recipe, sets, save
        self.plan: TrainingPlan = recipe.plan.plan()
        self.teacher_db = measure_sets(teacher, sets, recipe.sigmas)
        self.log = Table(folder / "log.csv", ["step", "loss", "learning_rate", "seconds"])
        self.validation = Table(folder / "validation.csv", ["step", *self.teacher_db])
        self.begin: float | None = None

    def __call__(self, step: int, loss: float, averaged: nn.Module) -> None:
        """Log a step; measure the averaged network after every ``validate_every`` steps but the last."""
        done = step + 1
        if self.begin is None:
            self.begin = time.monotonic() - self.log.last(before=done, column=3)
        seconds = time.monotonic() - self.begin
        self.log.append(done, f"{loss:.6f}", f"{learning_rate(self.plan, step):.4e}", f"{seconds:.1f}")
        if done % self.recipe.validate_every == 0 and done < self.plan.steps:
            found = self.measure(done, averaged)
            self.save(Result(done, seconds, averaged, found, self.teacher_db))

    def measure(self, step: int, network: nn.Module) -> dict[str, float]:
        """Measure and note the PSNR in dB by set and level."""
        found = measure_sets(network, self.sets, self.recipe.sigmas)
        self.validation.append(step, *(f"{value:.3f}" for value in found.values()))
        return found


def measure_sets(
    model: nn.Module, sets: dict[str, list[Tensor]], sigmas: Sequence[float]
) -> dict[str, float]:
    """Return the mean PSNR in dB by ``set sigma=level``; seeded unclipped noise, float32."""
    model.eval()
    return {
        f"{name} sigma={sigma:g}": float(np.mean([psnr(model, x, sigma, k) for k, x in enumerate(images)]))
        for name, images in sets.items()
        for sigma in sigmas
    }


def psnr(model: nn.Module, truth: Tensor, sigma: float, seed: int) -> float:
    """Return the PSNR in dB of one image (1, C, H, W) with noise of a level and a seed."""
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = denoise(model, truth + sigma / 255 * noise, torch.tensor([sigma]))
    return float(metrics.psnr_db(y.numpy(), truth.numpy()))


def validation_images(section: ValidationSection, data: Path) -> list[Tensor]:
    """Return the crops of a validation set, each (1, 3, H, W) in [0, 1]; smaller where an image is."""
    images = []
    for k, image in enumerate(load_images(data / section.folder)[:: section.every]):
        top, left = (max(0, (side - section.crop) // 2) for side in image.shape[1:])
        crop = image[None, :, top : top + section.crop, left : left + section.crop].float() / 255
        if section.color_augmented:
            crop = torch.from_numpy(augment_colors(crop.numpy(), np.random.default_rng(k)))
        images.append(crop)
    return images


def make_section(section: NetworkSection, recipe: TrainingRecipe, *, trust: bool = False) -> nn.Module:
    """Return a network of a training recipe, with initial values.

    Raises:
        RecipeError: when the network is unknown, or not trusted as ``networks.find_network`` has it.
    """
    factory = find_network(section.network, section.arguments, folder=recipe.folder, trust=trust)
    return make_network(factory, section.network, section.arguments)


def load_teacher(recipe: TrainingRecipe, data: Path, *, trust: bool = False) -> nn.Module:
    """Return the teacher with its weights, in evaluation mode.

    Raises:
        RecipeError: as ``make_section``.
        WeightsError: when the weights are missing, altered or of another network.
    """
    section = recipe.teacher
    teacher = make_section(section, recipe, trust=trust)
    load_weights(teacher, data / section.weights, sha256=section.sha256, trust=True)  # tensors only
    return speed_up(teacher.eval())


def make_student(
    recipe: TrainingRecipe, teacher: nn.Module, images: list[Tensor], *, trust: bool = False
) -> nn.Module:
    """Return the network with its initial weights.

    Raises:
        TrainingError: when the teacher's chain cannot be cut to the network's.
        WeightsError: when weights do not fit.
    """
    plan = recipe.plan.plan()
    torch.manual_seed(plan.seed)
    student = make_section(recipe.model, recipe, trust=trust)
    if recipe.start_from is not None:
        load_weights(student, Path(recipe.folder, recipe.start_from))
    elif recipe.cut is not None:
        section = recipe.cut
        target, source = (_chain(network, section.chain) for network in (student, teacher))
        channels = next(layer for layer in target if isinstance(layer, nn.Conv2d)).out_channels

        def run() -> None:
            for k in range(section.batches):
                batch = patches(images, plan, plan.steps + k)
                denoise(teacher, batch.noisy, batch.sigma)

        thin = cut_channels(source, channels, run)
        fit_state(
            target, thin.state_dict(), "the cut chain does not fit the network", "Check model.arguments."
        )
    return speed_up(student)


def _chain(network: nn.Module, path: str) -> nn.Sequential:
    try:
        chain = network.get_submodule(path)
    except AttributeError:
        chain = None
    if not isinstance(chain, nn.Sequential):
        raise TrainingError(
            f"{type(network).__name__} has {type(chain).__name__} at cut.chain {path!r}; expected an "
            "nn.Sequential of convolutions. Name another part."
        )
    return chain


def run_recipe(
    recipe: TrainingRecipe,
    data: Path,
    folder: Path,
    save: Callable[[Result], None],
    report: Callable[[int, float], None] = lambda step, loss: None,
    *,
    trust: bool = False,
) -> None:
    """Train by a recipe, from the checkpoint where there is one.

    Args:
        recipe: the training recipe.
        data: folder at which the recipe's paths start.
        folder: folder of checkpoint and tables, made where there is none.
        save: called with the averaged network after every measurement, and with the one of the last step.
        report: called after every step with (step, loss).
        trust: allow networks from anywhere.

    Raises:
        RecipeError, TrainingError, WeightsError: as ``train``, ``make_student`` and ``load_teacher``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(recipe, data, trust=trust)
    images = [image for name in recipe.images for image in load_images(data / name)]
    sets = {section.name: validation_images(section, data) for section in recipe.validation}
    student = make_student(recipe, teacher, images, trust=trust)
    watch = Watch(recipe, sets, teacher, folder, save)
    if not watch.validation.rows:
        watch.measure(0, student)

    def both(step: int, loss: float, averaged: nn.Module) -> None:
        assert isinstance(averaged.module, nn.Module)
        watch(step, loss, averaged.module)
        report(step, loss)

    averaged, seconds = train(
        *(student, images, watch.plan, folder / "checkpoint.pt"),
        criterion=Distillation(teacher, recipe.teacher.weight),
        report=both,
        save_every=recipe.checkpoint_every,
    )
    found = watch.measure(watch.plan.steps, averaged)
    save(Result(watch.plan.steps, seconds, averaged, found, watch.teacher_db))
