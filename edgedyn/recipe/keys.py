"""The sections of a recipe: what each key means, its default, and what it may be."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from edgedyn.sections import Section


class ModelSection(Section):
    """The network and its weights."""

    network: str = Field(description="a file of edgedyn/models/, or package.module:function of yours")
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the network")
    weights: str | None = Field(default=None, description="safetensors file; .pth only with --trust")
    sha256: str | None = Field(default=None, description="digest that the weights file must have")
    seed: int = Field(default=0, description="of the initial values of a network without weights")


class InputSection(Section):
    """One input of the program: an image of a fixed size."""

    name: str = "image"
    shape: list[int] = Field(
        description="B, C, H, W; larger images run in tiles of H x W", min_length=4, max_length=4
    )
    low: float = 0.0
    high: float = 1.0
    meaning: str = "sRGB image, RGB order, 0 black, 1 white"


Estimator = Literal["minmax", "percentile", "mse", "entropy"]


class RangeSection(Section):
    """How the INT8 range of a tensor is found, by what the tensor is."""

    feature: Estimator = Field(default="minmax", description="feature maps")
    kernel: Estimator = Field(default="minmax", description="generated kernels")
    weight: Literal["minmax", "percentile", "mse"] = Field(
        default="minmax",
        description="each output channel by itself, whose values are too few for a distribution (entropy)",
    )
    percentile: float = Field(
        default=99.99, description="percent of values inside, (50, 100], where an estimator is percentile"
    )

    @field_validator("percentile")
    @classmethod
    def _is_most_of_the_values(cls, value: float) -> float:
        if not 50 < value <= 100:  # so that nan is refused too
            raise ValueError("expected more than 50 and at most 100, (50, 100]")
        return value


class CoverageSection(Section):
    """How often the calibration samples must meet each outcome of what the network decides."""

    samples: int = Field(
        default=4,
        ge=0,
        description="that must take each variant, have each mask active, and fall in each band; 0 demands "
        "nothing, and of a network without weights nothing is demanded",
    )
    own: int = Field(
        default=16,
        ge=1,
        description="from so many on a variant is calibrated on its own samples, else on all",
    )
    bands: list[float] = Field(
        default=[0.0, 1.0],
        min_length=2,
        description="edges of the mask densities that must be met: low < active share of a sample <= high",
    )
    unused: list[str] = Field(
        default=[],
        description="masks that training left empty, by dotted path, of which nothing is demanded; * matches "
        "any part",
    )

    @model_validator(mode="after")
    def _bands_increase(self) -> CoverageSection:
        if self.bands != sorted(set(self.bands)) or not 0 <= self.bands[0] < self.bands[-1] <= 1:
            raise ValueError(f"bands is {self.bands}; expected edges that increase, from 0 to 1 at most")
        return self


class QuantizeSection(Section):
    """How INT8 is made."""

    ranges: RangeSection = RangeSection()
    coverage: CoverageSection = CoverageSection()
    generated: Literal["float", "tensor", "tap"] = Field(
        default="float",
        description="generated kernels where outputs are INT8: float, a step a tensor, or a step a tap",
    )
    equalize: bool = Field(default=True, description="scale channels between convolutions to one range")
    equalize_dense: float = Field(
        default=32.0,
        ge=1,
        description="how many times a channel may be widened for it that a dense layer takes back",
    )
    equalize_outputs: bool = Field(
        default=True,
        description="also of what float operators read, where outputs are INT8; costs a product a map",
    )
    equalize_inputs: bool = Field(
        default=False,
        description="also of what float operators write for INT8 layers: a gain where those write float "
        "(on tensorrt, and layers that are dynamic); costs a product a map",
    )
    rounding: Literal["nearest", "reconstruct"] = Field(
        default="reconstruct",
        description="of weights: each to the nearest, or so that layers keep their outputs",
    )
    bias_correction: Literal["none", "fast", "full"] = Field(
        default="none", description="NNCF's; reconstruction sets biases itself"
    )
    bn_reestimation: bool = Field(
        default=False,
        description="of rounded layers: each channel gets the mean and deviation that it had in float",
    )
    finetune: int = Field(
        default=0,
        ge=0,
        le=10000,
        description="steps of quantization-aware fine-tuning, the last resort: each runs one image both ways",
    )
    finetune_images: str | None = Field(
        default=None,
        description="set manifest or folder to fine-tune on; else other crops of the calibration set",
    )
    keep_float: list[str] = Field(
        default=[], description="dotted layer paths that stay float; * matches any part"
    )
    dynamic: list[str] = Field(
        default=[],
        description="dotted layer paths that take the range of what they read from each image and write "
        "float, where the target can: dense convolutions and linear layers of rows on executorch",
    )
    shift: bool = Field(
        default=False,
        description="where a target's steps have zero point 0 (tensorrt): move maps so that they use all 256 "
        "codes, not half of them behind a ReLU; costs a pad of each padded map",
    )
    max_drop_db: float | None = Field(
        default=None,
        gt=0,
        description="PSNR that INT8 may cost on the calibration images: layers stay float until it does",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="calibration samples, each of another image; by default what the set says",
    )
    color_augmented: int = Field(
        default=0,
        ge=0,
        description="more samples for ranges, in exchanged and saturated colours: few photos are of pure "
        "yellow, and one outside of all ranges is clipped visibly",
    )
    table: str | None = Field(
        default=None, description="calibration table, reused where it exists, written where it does not"
    )

    @model_validator(mode="after")
    def _images_are_used(self) -> QuantizeSection:
        if self.finetune_images is not None and self.finetune == 0:
            raise ValueError(
                f"finetune_images is {self.finetune_images!r} and finetune is 0 steps; expected steps, or no "
                "images"
            )
        return self


class TileSection(Section):
    """How larger images are cut."""

    overlap: int = Field(default=32, ge=0, description="pixels that neighbouring tiles share")


class RouteSection(Section):
    """How a network is split into variants that the host picks from."""

    capacity: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="quantile of active positions on the calibration set that the quick variant holds",
    )


class LimitSection(Section):
    """What the checks demand."""

    exact: float = Field(default=1e-12, description="float64 rewrite error, relative to the largest output")
    drop_db: float = Field(default=0.25, description="PSNR that the deployed precision may cost")
    int8_share: float = Field(default=0.8, description="multiply-adds of convolutions that INT8 must reach")
    device_levels: float = Field(
        default=0.25, description="fp32, fp16: mean |device - program|, 8-bit grey levels"
    )
    sqnr_db: float = Field(default=15.0, description="signal to error that a task without truth must keep")
    predictions: float = Field(default=0.9, description="share of predictions that deployment may not change")
    gate: float = Field(default=0.995, description="share of images that must keep their variant")
    mask_flips: float = Field(default=0.005, description="share of mask positions that may change")
    flipped_margin: float = Field(
        default=0.25, description="largest distance to the other side, in rms, that a decision may cross"
    )
