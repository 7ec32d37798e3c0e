"""The recipe: network, weights, images, target, precision and limits of a build.

A recipe is a YAML file named ``<network>.<target>.<precision>.yaml``; paths in it are relative to the file.
An unknown key or a wrong type is an error, which names the nearest known key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from edgedyn.bundle.tensors import TensorSpec
from edgedyn.errors import RecipeError, shown
from edgedyn.images.noise import NoiseSection
from edgedyn.images.tasks import TASKS, Task
from edgedyn.reading import TextError
from edgedyn.recipe.factory import make_network
from edgedyn.recipe.inputs import (
    MAX_SIZE,
    FurtherInputSection,
    InputSection,
    OutputSection,
    input_specs,
    output_spec,
    picture_contract,
)
from edgedyn.recipe.keys import (
    LimitSection,
    ModelSection,
    PathName,
    QuantizeSection,
    RouteSection,
    TileSection,
)
from edgedyn.recipe.networks import find_network
from edgedyn.recipe.shipped import find_recipe
from edgedyn.sections import Section, dump_yaml, parse_recipe, read_recipe, read_yaml

if TYPE_CHECKING:
    from torch import nn


class Recipe(Section):
    """A parsed recipe; its relative paths start at ``folder``."""

    name: str = Field(description="Name of the recipe, `<network>.<target>.<precision>`.")
    model: ModelSection
    task: Literal["denoise", "upscale", "classify", "keypoints"] = Field(
        default="denoise",
        description="Task of the network. It selects the samples that are drawn from the images and the "
        "measures of accuracy: PSNR for denoise and upscale, agreement with float32 for the others.",
    )
    input: InputSection
    guide: InputSection | None = Field(
        default=None, description="Second input of a joint upsampler: the grey image at full resolution."
    )
    inputs: list[FurtherInputSection] = Field(
        default=[],
        description="Further inputs of the network, in order. Each has `name`, `shape`, and either `value`, "
        "a constant, or `noise_level`, a factor. With `noise_level` the input holds the standard deviation "
        "of the picture's noise, 0..1 scale, times the factor: 255 for a network that takes 0 to 255.",
    )
    output: OutputSection = OutputSection()
    outputs: list[str | int] = Field(
        default=[],
        description="Outputs of the network that the program has, by key, attribute or index; `aux.0` is the "
        "first inside of `aux`. The first of the list is measured against the truth, the others against "
        "float. Required where the network returns several tensors.",
    )
    scale: int | None = Field(
        default=None,
        ge=2,
        description="Enlargement of the task upscale, for instance 4. By default the network's own.",
    )
    target: str = Field(description="Runtime to build for: a name from `edgedyn list targets`.")
    precision: Literal["fp32", "fp16", "int8"] = Field(
        description="Precision of the deployed program; int8 needs `calibration`."
    )
    kernels: Literal["stock", "fused"] = Field(
        default="stock",
        description="Kernels of the program. stock: operators of the published runtime alone; fused: kernels "
        "of edgedyn, which the app's own build of the runtime must include (`edgedyn ops build`, `edgedyn "
        "plugin build`).",
    )
    forms: dict[str, str] = Field(
        default={},
        description="Forms by op, each in place of the first form that the target can run. A form is one way "
        "to compute an op; `edgedyn list ops` names both.",
    )
    route: RouteSection = RouteSection()
    quantize: QuantizeSection = QuantizeSection()
    calibration: PathName | None = Field(
        default=None, description="Calibration images: set manifest or folder. Required for int8."
    )
    validation: PathName = Field(
        description="Validation images: set manifest or folder, without any image of the calibration set."
    )
    noise: NoiseSection | None = Field(
        default=None,
        description="Noise added to both sets, in place of their own. Without it, sets with Gaussian noise "
        "take the level `model.arguments.sigma` of a network that is conditioned on one.",
    )
    limits: LimitSection = LimitSection()
    tile: TileSection = TileSection()
    folder: str = "."

    @model_validator(mode="after")
    def _values_fit_together(self) -> Recipe:
        shape, overlap = self.input.shape, self.tile.overlap
        if shape[0] != 1 or shape[1] not in (1, 3, 4) or min(shape) < 1:
            raise ValueError(f"input.shape is {shape}; expected [1, C, H, W], C 1, 3 or 4 (packed Bayer)")
        if self.guide is not None and self.guide.shape[0] != 1:
            raise ValueError(f"guide.shape is {self.guide.shape}; expected [1, C, H, W]")
        if (self.guide is not None) and self.task != "upscale":
            raise ValueError(f"guide is for the task 'upscale'; the task is {self.task!r}")
        if self.scale is not None and self.task != "upscale":
            raise ValueError(f"scale is for the task 'upscale'; the task is {self.task!r}")
        for spec in self.input_specs():
            if not all(1 <= size <= MAX_SIZE for size in spec.shape):
                raise ValueError(
                    f"the shape of {spec.name!r} is {shown(list(spec.shape))}; expected sizes from 1 to "
                    f"{MAX_SIZE}"
                )
        names = [spec.name for spec in self.input_specs()]
        if len(set(names)) != len(names):
            raise ValueError(f"the inputs have the names {names}; expected another one for each")
        if len(set(map(str, self.outputs))) != len(self.outputs):
            raise ValueError(f"outputs are {self.outputs}; expected each once")
        picture_contract(self.output, self.input)
        if self.output != OutputSection() and not TASKS[self.task].has_truth:
            raise ValueError(f"output is for tasks whose output is a picture; the task is {self.task!r}")
        if self.quantize.color_augmented and shape[1] != 3:
            raise ValueError(
                f"quantize.color_augmented is {self.quantize.color_augmented}; expected 0 for images of "
                f"{shape[1]} channel{'s' * (shape[1] > 1)}, which have no colours"
            )
        if overlap >= min(shape[2:]):
            raise ValueError(
                f"tile.overlap {overlap} leaves nothing of a tile of {shape[2:]}; expected less than "
                f"{min(shape[2:])}"
            )
        return self

    def path(self, name: str) -> Path:
        """Resolve a path of the recipe relative to its folder."""
        return Path(self.folder, name)

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML, defaults included."""
        return dump_yaml(self.model_dump(exclude={"folder"}))

    def digest(self) -> str:
        """Return the sha256 of the recipe's values, without its folder."""
        text = json.dumps(self.model_dump(exclude={"folder"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def weights_digest(self) -> str:
        """Return the sha256 of the weights file, or the empty string for a network without one."""
        if self.model.weights is None:
            return ""
        return hashlib.sha256(self.path(self.model.weights).read_bytes()).hexdigest()

    @property
    def sets_noise(self) -> NoiseSection | float | None:
        """Noise for both image sets: the recipe's own, or the level on which the network is conditioned.

        None if the recipe has neither: each set keeps its own noise.
        """
        level = self.model.arguments.get("sigma")
        if self.noise is not None or not isinstance(level, int | float) or isinstance(level, bool):
            return self.noise  # bool is a subclass of int
        return float(level)

    @property
    def is_trained(self) -> bool:
        """Whether the recipe names trained weights."""
        return self.model.weights is not None

    @property
    def sampling(self) -> Task:
        """The task with the recipe's own scale: how samples are drawn, and their truth."""
        task = TASKS[self.task]
        return task if self.scale is None else replace(task, scale=self.scale)

    @property
    def dtype(self) -> str:
        """Type of the program's inputs and outputs, ``float32`` or ``float16``."""
        return "float16" if self.precision == "fp16" else "float32"

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return every input of the program: the picture, its guide, constants and noise levels."""
        return input_specs(self.input, self.guide, self.inputs, self.dtype)

    def output_spec(self, name: str, shape: Sequence[int]) -> TensorSpec:
        """Return an output of the program; where the task has a truth, one of its shape is a picture."""
        return output_spec(name, shape, self.dtype, task=self.sampling, image=self.input, section=self.output)

    def input_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the program's inputs."""
        return [spec.shape for spec in self.input_specs()]

    def load_model(self, *, trust: bool = False) -> nn.Module:
        """Build the network in evaluation mode and load its weights.

        A network without weights is initialized from ``model.seed``; its BatchNorm statistics are set later
        (``weights.settle_norms``). Weights that it computes from its parameters alone are stored. Its
        attribute ``weights_notes`` says which weights of a checkpoint were taken.

        Args:
            trust: allow a network from anywhere (``networks.find_network``), and weights that are a pickle of
                tensors.

        Raises:
            RecipeError: when the network is unknown, is not trusted, or does not take its arguments.
            ModelError: when the network cannot be made, with the line of its code; when it is none.
            WeightsError: when the weights are missing, unsafe, altered, not finite, or do not fit.
        """
        from edgedyn.checkpoints.weights import load_weights
        from edgedyn.layers import store_weights

        network = find_network(self.model.network, self.model.arguments, folder=self.folder, trust=trust)
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(self.model.seed)
            model = make_network(network, self.model.network, self.model.arguments)
        notes: tuple[str, ...] = ()
        if self.model.weights is not None:
            path = self.path(self.model.weights)
            notes = load_weights(model, path, sha256=self.model.sha256, trust=trust)
        stored = store_weights(model.eval())
        stored.weights_notes = notes  # type: ignore[assignment]
        return stored


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Return a recipe as it is, or load it by path or name; errors as ``load_recipe``."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Example:
        recipe = edgedyn.load_recipe("mallenet-s.phone.int8", ["precision=fp32"])

    Args:
        recipe: YAML file, or the name of a shipped recipe, ``mallenet-s.phone.int8``.
        overrides: ``dotted.key=value`` items; the value is YAML. Relative paths in them start at the working
            directory, unlike those in the file. Other weights remove the file's ``model.sha256``, the digest
            of its own weights.

    Raises:
        RecipeError: for a missing or unreadable file, an unknown key (the nearest is named) or a wrong type.
    """
    path = find_recipe(recipe)
    values = read_recipe(path, "recipe", "edgedyn list keys")
    for override in sorted(overrides, key=lambda text: text.startswith("model.sha256=")):
        apply_override(values, override)  # the digest last, since other weights remove the file's
    return parse_recipe(Recipe, values, path, "recipe")


_PATH_KEYS = {"model.weights", "calibration", "validation", "quantize.table", "quantize.finetune_images"}


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in nested dictionaries; the value is YAML.

    Raises:
        RecipeError: for a text that is no override.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"--set {shown(override)} is no override; expected key=value, for instance "
            "quantize.rounding=nearest."
        )
    try:
        value = read_yaml(text)
    except TextError as error:
        raise RecipeError(
            f"--set {shown(override)}: the value is not YAML: {error}. Quote it, or close its brackets."
        ) from error
    if key in _PATH_KEYS and isinstance(value, str):
        value = str(Path(value).absolute())
    if key == "model.weights" and isinstance(values.get("model"), dict):
        values["model"].pop("sha256", None)
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(
                f"--set {shown(override)}: {shown(part)} is a value; expected a section. Set it itself."
            )
    values[parts[-1]] = value
