"""A training recipe: network, teacher, initial weights, images and plan of one run, as YAML.

Paths start at the folder of the data, which the command line names; ``start_from`` starts at the recipe's own
folder. An unknown key or a wrong type is an error, which names the nearest known key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import Field, model_validator

from edgedyn.recipe.keys import Arguments
from edgedyn.sections import Section, Seed, parse_recipe, read_recipe
from edgedyn.training.denoise import TrainingPlan


class NetworkSection(Section):
    """A network without weights."""

    network: str = Field(
        description="Name of a network from `edgedyn list networks`, or package.module:name."
    )
    arguments: Arguments = Field(default={}, description="Keyword arguments of the network.")


class TeacherSection(NetworkSection):
    """A trained network."""

    weights: str = Field(description="Weights: safetensors, or a `.pth` file of tensors.")
    sha256: str | None = Field(default=None, description="SHA-256 that the weights file must have.")
    licence: str = Field(description="Source and licence of the weights; the training card repeats it.")
    weight: float = Field(default=0.7, ge=0, le=1, description="Share of the teacher's output in the loss.")


class CutSection(Section):
    """Initial weights: the teacher's chain of convolutions, cut to the network's channels."""

    chain: str = Field(
        default="model", description="Path of the chain in teacher and network, nn.Sequential."
    )
    batches: int = Field(default=16, ge=1, description="Training batches that measure the channels' energy.")


class ValidationSection(Section):
    """Images on which the PSNR is measured; none of them is trained on."""

    name: str
    folder: str
    every: int = Field(default=1, ge=1, description="Take every n-th image of the folder, by name.")
    crop: int = Field(default=192, ge=16, description="Height and width of the crop at the centre, pixels.")
    color_augmented: bool = Field(
        default=False, description="Exchange the channels and triple the distance from gray."
    )


class PlanSection(Section):
    """Settings of the loop; see ``edgedyn.training.denoise.TrainingPlan``."""

    steps: int = Field(ge=1)
    batch: int = Field(default=8, ge=1)
    patch: int = Field(default=64, ge=1)
    sigma: list[float] = Field(default=[5.0, 50.0], min_length=2, max_length=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=200, ge=1)
    ema: float = Field(default=0.999, ge=0, lt=1)
    freeze_norms: int = Field(default=2000, ge=0, description="0 also for a network without BatchNorm.")
    seed: Seed = 0
    bfloat16: bool = Field(default=False, description="Faster only on a CPU with bfloat16 instructions.")
    compile: bool = False
    halve: float = Field(default=0.5, ge=0, le=1)
    recolor: float = Field(default=0.25, ge=0, le=1)
    fresh: list[str] = Field(default=[])
    fresh_rate: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _levels_increase(self) -> PlanSection:
        if not 0 <= self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma is {self.sigma}; expected [low, high] with 0 <= low <= high")
        return self

    def plan(self) -> TrainingPlan:
        """Return the plan of these settings."""
        values = self.model_dump()
        low, high = values.pop("sigma")
        return TrainingPlan(sigma=(low, high), fresh=tuple(values.pop("fresh")), **values)


class TrainingRecipe(Section):
    """A parsed training recipe; ``start_from`` starts at ``folder``."""

    name: str
    model: NetworkSection
    teacher: TeacherSection
    cut: CutSection | None = Field(default=None, description="Without it the initial weights are random.")
    start_from: str | None = Field(
        default=None,
        description="Weights to continue from, safetensors, in place of `cut`: a checkpoint stays on the "
        "machine that wrote it.",
    )
    images: list[str] = Field(min_length=1, description="Folders of training images.")
    validation: list[ValidationSection] = Field(min_length=1)
    sigmas: list[float] = Field(default=[15.0, 25.0, 50.0], min_length=1, description="Levels of the PSNR.")
    plan: PlanSection
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between checkpoints.")
    validate_every: int = Field(default=250, ge=1, description="Steps between measurements of the PSNR.")
    folder: str = "."

    @model_validator(mode="after")
    def _validation_is_held_out(self) -> TrainingRecipe:
        both = sorted({section.folder for section in self.validation} & set(self.images))
        if both:
            raise ValueError(f"{both} are in images and in validation; expected folders of one of them")
        return self

    def digest(self) -> str:
        """Return the sha256 of the recipe's values, without its folder."""
        text = json.dumps(self.model_dump(exclude={"folder"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_training_recipe(path: Path) -> TrainingRecipe:
    """Read a training recipe; its name is that of the file unless it states one.

    Raises:
        RecipeError: for a missing or unreadable file, an unknown key (the nearest is named) or a wrong type.
    """
    values = read_recipe(path, "training recipe", "recipes/train/ has examples")
    return parse_recipe(TrainingRecipe, values, path, "training recipe")
