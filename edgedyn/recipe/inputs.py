"""The inputs and outputs of a recipe: their keys, and the tensors of the program that they describe.

A picture has the same values everywhere: ``edgedyn.bundle.tensors`` converts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgedyn.bundle.tensors import CONSTANT, GUIDE, NOISE_LEVEL, OTHER, PICTURE, TensorSpec, describe_picture
from edgedyn.images.tasks import Task
from edgedyn.sections import Section

MAX_SIZE = 2**14  # of each axis: programs have fixed shapes, and larger photos are run in tiles
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Range = Annotated[list[_Finite], Field(min_length=2, max_length=2)]
_PerChannel = "one number, or one per channel in the order of the tensor"

_AsInput = "by default that of `input`"


class InputSection(Section):
    """One input of the program: a picture of a fixed size, and the values that it has in the network.

    A pixel v, 0 black, 1 white, becomes (low + v * (high - low) - mean) / std; ``range`` is [low, high].
    """

    name: str = Field(default="image", description="Name of the input in the bundle's manifest.")
    shape: list[int] = Field(
        description="Shape B, C, H, W with B = 1; larger images run in tiles of H x W pixels. C is 1 for "
        "gray images, 3 for colour, 4 for packed Bayer: red, green of the red rows, green of the blue rows, "
        "blue.",
        min_length=4,
        max_length=4,
    )
    range: _Range = Field(
        default=[0.0, 1.0],
        description="Values of black and white that the network was trained for, before mean and std: "
        "[0, 255] for 8-bit values. Images are converted in calibration, validation and `edgedyn run`. The "
        "manifest states range, mean, std and order for an app.",
    )
    mean: _Finite | list[_Finite] = Field(
        default=0.0,
        description=f"Mean that is subtracted from values of `range`: {_PerChannel}. ImageNet's, with the "
        "range [0, 1]: [0.485, 0.456, 0.406], and std [0.229, 0.224, 0.225].",
    )
    std: _Positive | list[_Positive] = Field(
        default=1.0, description=f"Standard deviation that divides the difference: {_PerChannel}."
    )
    order: Literal["RGB", "BGR"] = Field(default="RGB", description="Order of the channels of colour images.")
    meaning: str | None = Field(
        default=None,
        description="Contents of the input in one phrase, for readers of the bundle's manifest. By default "
        "colour space, range and order.",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_bounds(cls, values: Any) -> Any:
        if isinstance(values, dict) and (old := sorted({"low", "high"} & values.keys())):
            raise ValueError(
                f"{old[0]!r} is no key; expected range: [low, high], the values of black and white that the "
                "network takes"
            )
        return values

    @model_validator(mode="after")
    def _fits_the_channels(self) -> InputSection:
        picture_contract(self, self)
        return self


class FurtherInputSection(Section):
    """One more input of the network, which is no picture: a constant, or the level of the picture's noise."""

    name: str = Field(description="Name of the input in the bundle's manifest.")
    shape: list[int] = Field(min_length=1, description="Shape of the input, B = 1 first.")
    value: _Finite | None = Field(default=None, description="The constant that the input always holds.")
    noise_level: _Finite | None = Field(
        default=None, description="Factor of the noise's standard deviation, which is on the scale of 0 to 1."
    )
    meaning: str | None = Field(default=None, description="Contents of the input in one phrase.")

    @model_validator(mode="after")
    def _has_one_source(self) -> FurtherInputSection:
        if (self.value is None) == (self.noise_level is None):
            actual = "neither" if self.value is None else "both"
            raise ValueError(
                f"input {self.name!r} has {actual} of value and noise_level; expected one: value, a "
                "constant, or noise_level, a factor of the noise's standard deviation (0..1 scale)"
            )
        if min(self.shape) < 1 or self.shape[0] != 1:
            raise ValueError(
                f"input {self.name!r} has shape {self.shape}; expected sizes from 1, B = 1 first"
            )
        return self


class OutputSection(Section):
    """Values of the output picture in the network; each key is by default that of ``input``."""

    range: _Range | None = Field(default=None, description=f"Values of black and white; {_AsInput}.")
    mean: _Finite | list[_Finite] | None = Field(default=None, description=f"Mean; {_AsInput}.")
    std: _Positive | list[_Positive] | None = Field(
        default=None, description=f"Standard deviation; {_AsInput}."
    )
    order: Literal["RGB", "BGR"] | None = Field(
        default=None, description=f"Order of the channels; {_AsInput}."
    )


def picture_contract(section: InputSection | OutputSection, image: InputSection) -> dict[str, Any]:
    """Return range, mean, std and order of a picture; a key that its section does not set is the image's.

    Raises:
        ValueError: for values that do not fit the channels of ``section``, or of ``image``.
    """
    keys = ("range", "mean", "std", "order")
    found = {key: getattr(section if getattr(section, key) is not None else image, key) for key in keys}
    channels = section.shape[1] if isinstance(section, InputSection) else image.shape[1]
    if found["range"][0] >= found["range"][1]:
        raise ValueError(f"range is {found['range']}; expected [low, high] with low < high")
    for key in ("mean", "std"):
        value = found[key]
        if isinstance(value, list) and len(value) not in (1, channels):
            raise ValueError(f"{key} has {len(value)} numbers; expected 1, or one per channel, {channels}")
        found[key] = tuple(value) if isinstance(value, list) else (value,)
    if found["order"] == "BGR" and channels != 3:
        raise ValueError(f"order is BGR for {channels} channels; expected it for 3: colours have an order")
    return {**found, "range": tuple(found["range"])}


def input_specs(
    image: InputSection, guide: InputSection | None, further: Sequence[FurtherInputSection], dtype: str
) -> tuple[TensorSpec, ...]:
    """Return every input of a program in order: the picture, its guide, constants and noise levels."""
    specs = []
    for section, role in ((image, PICTURE), (guide, GUIDE)):
        if section is not None:
            specs.append(_picture(section.name, dtype, section.shape, role, section.meaning, section, image))
    for one in further:
        role, value = (CONSTANT, one.value) if one.noise_level is None else (NOISE_LEVEL, one.noise_level)
        noise = f"standard deviation of the noise, 0..{value:g} scale"
        meaning = one.meaning or (noise if role == NOISE_LEVEL else f"always {value:g}")
        specs.append(TensorSpec(one.name, dtype, tuple(one.shape), meaning, role, value=value or 0.0))
    return tuple(specs)


def output_spec(
    name: str, shape: Sequence[int], dtype: str, *, task: Task, image: InputSection, section: OutputSection
) -> TensorSpec:
    """Return an output of a program; where the task has a truth, one of the truth's shape is a picture."""
    batch, channels, height, width = image.shape
    if task.has_truth and list(shape) == [batch, channels, height * task.scale, width * task.scale]:
        return _picture(name, dtype, shape, PICTURE, None, section, image)
    meaning = "further output of the network" if task.has_truth else task.output
    return TensorSpec(name, dtype, tuple(shape), meaning, OTHER)


def _picture(
    name: str,
    dtype: str,
    shape: Sequence[int],
    role: str,
    meaning: str | None,
    section: InputSection | OutputSection,
    image: InputSection,
) -> TensorSpec:
    contract = picture_contract(section, image)
    is_moved = any(contract["mean"]) or any(value != 1 for value in contract["std"])
    usual = describe_picture(shape[1], contract["range"], contract["order"], is_moved=is_moved)
    return TensorSpec(name, dtype, tuple(shape), meaning or usual, role, **contract)
