"""The sections of a recipe: type, default and meaning of each key.

The descriptions are the text of docs/recipe.md, of ``edgedyn list keys`` and of the JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, WithJsonSchema, field_validator, model_validator

from edgedyn.sections import Section, Seed

# values that JSON holds; its schema would name itself
Arguments = Annotated[dict[str, JsonValue], WithJsonSchema({"additionalProperties": True, "type": "object"})]
_Share = Annotated[float, Field(ge=0, le=1)]
_FromZero = Annotated[float, Field(ge=0)]
PathName = Annotated[str, Field(min_length=1)]  # an empty one would be the recipe's own folder


class ModelSection(Section):
    """The network and its weights."""

    network: str = Field(
        description="Name of a network from `edgedyn list networks`, or `package.module:function` of an "
        "importable module of yours. Some need `--trust`: docs/your-network.md."
    )
    arguments: Arguments = Field(
        default={}, description="Keyword arguments of the function that makes the network."
    )
    weights: PathName | None = Field(
        default=None,
        description="Trained weights: a safetensors file; a `.pth` file only with `--trust`. Without weights "
        "the network is initialized from `model.seed`, and its accuracy is reported without a limit.",
    )
    sha256: str | None = Field(default=None, description="SHA-256 that the weights file must have.")
    seed: Seed = Field(
        default=0, description="Random seed of the initial values, where there are no weights."
    )


Estimator = Literal["minmax", "percentile", "mse", "entropy"]


class RangeSection(Section):
    """Estimator of the INT8 range, per kind of tensor."""

    feature: Estimator = Field(
        default="minmax",
        description="Range estimator of feature maps. minmax: all values; percentile: all but the rarest at "
        "either end; mse: least squared error of rounding and clipping; entropy: least Kullback-Leibler "
        "divergence. The last three clip outliers.",
    )
    kernel: Estimator = Field(default="minmax", description="Range estimator of generated kernels.")
    weight: Literal["minmax", "percentile", "mse"] = Field(
        default="minmax",
        description="Range estimator of weights, one range per output channel: too few values for entropy.",
    )
    percentile: float = Field(
        default=99.99,
        allow_inf_nan=True,  # the rule below says more
        description="Percent of the values inside the range, in (50, 100], for the estimator percentile.",
    )

    @field_validator("percentile")
    @classmethod
    def _is_most_of_the_values(cls, value: float) -> float:
        if not 50 < value <= 100:  # so that nan is refused too
            raise ValueError("expected more than 50 and at most 100, (50, 100]")
        return value


class CoverageSection(Section):
    """Required number of calibration samples per outcome of the network's decisions."""

    samples: int = Field(
        default=4,
        ge=0,
        description="Least number of calibration samples that take each variant, activate each mask, and "
        "fall into each density band; fewer refuse the build. 0 disables the check; a network without "
        "weights is not checked.",
    )
    own: int = Field(
        default=16,
        ge=1,
        description="Least number of samples that take a variant for it to be calibrated on these alone; "
        "with fewer it is calibrated on all samples.",
    )
    bands: list[float] = Field(
        default=[0.0, 1.0],
        min_length=2,
        description="Edges of the mask density bands: a sample is in the band (low, high] if low < active "
        "fraction of its mask <= high.",
    )
    unused: list[str] = Field(
        default=[],
        description="Masks that training left empty, which the check passes over: dotted paths, `*` matches "
        "any part.",
    )

    @model_validator(mode="after")
    def _bands_increase(self) -> CoverageSection:
        if self.bands != sorted(set(self.bands)) or not 0 <= self.bands[0] < self.bands[-1] <= 1:
            raise ValueError(f"bands is {self.bands}; expected edges that increase, from 0 to 1 at most")
        return self


class QuantizeSection(Section):
    """Quantization to INT8."""

    ranges: RangeSection = RangeSection()
    coverage: CoverageSection = CoverageSection()
    generated: Literal["float", "tensor", "tap"] = Field(
        default="float",
        description="Precision of generated kernels on targets with INT8 outputs (executorch). float: not "
        "quantized; tensor: INT8, one scale per kernel tensor; tap: INT8, one scale per tap.",
    )
    equalize: bool = Field(
        default=True,
        description="Equalize channels: scale the channels between two convolutions to one range, exactly.",
    )
    equalize_dense: float = Field(
        default=32.0,
        ge=1,
        description="Largest factor by which equalization scales a channel up if a dense layer undoes it. "
        "Lower it where equalization costs accuracy: the dense layer's weights share one scale per output. "
        "Channels more than 32 times the median one do not count where that lowers the rounding error.",
    )
    equalize_outputs: bool = Field(
        default=True,
        description="Equalize also layer outputs that float operators consume, on targets with INT8 outputs "
        "(executorch). Costs one float Mul per feature map.",
    )
    equalize_inputs: bool = Field(
        default=False,
        description="Equalize also inputs of INT8 layers that float operators produce. Helps on targets with "
        "float outputs (tensorrt) and at `dynamic` layers. Costs one float Mul per feature map. Inputs with "
        "a channel more than 32 times the median one are equalized in any case, where that pays.",
    )
    rounding: Literal["nearest", "reconstruct"] = Field(
        default="reconstruct",
        description="Rounding of weights. nearest: each weight to the nearest INT8 value, fast; reconstruct: "
        "all weights of a layer together, so that its output changes least.",
    )
    bias_correction: Literal["none", "fast", "full"] = Field(
        default="none",
        description="Bias correction by NNCF (`pip install edgedyn[nncf]`). With `rounding: reconstruct` not "
        "needed: reconstruction sets the biases.",
    )
    bn_reestimation: bool = Field(
        default=False,
        description="Give each channel of a quantized layer the mean and standard deviation that it had in "
        "float.",
    )
    finetune: int = Field(
        default=0,
        ge=0,
        le=10000,
        description="Steps of quantization-aware fine-tuning, the last resort. Each step runs one image in "
        "float and fake-quantized; a result that is not better on held-out samples is dropped.",
    )
    finetune_images: PathName | None = Field(
        default=None,
        description="Images for fine-tuning: set manifest or folder. By default other crops of the "
        "calibration set.",
    )
    keep_float: list[str] = Field(
        default=[],
        description="Layers that stay float: dotted paths, `*` matches any part; the path of a module names "
        "its layers. A block that a fused kernel computes stays float with any of its layers.",
    )
    dynamic: list[str] = Field(
        default=[],
        description="Layers whose input range is computed from each image and whose output is float: dotted "
        "paths, `*` matches any part. Only executorch has this, for dense convolutions and linear layers; "
        "other targets ignore the key.",
    )
    shift: bool = Field(
        default=False,
        description="On targets with zero point 0 (tensorrt): add an offset to activations, undone in the "
        "bias, so that they use all 256 values behind a ReLU instead of half. Costs one pad per padded "
        "feature map.",
    )
    max_drop_db: float | None = Field(
        default=None,
        gt=0,
        description="Largest PSNR drop of INT8 on the calibration images, in dB: layers stay float, the "
        "costliest first, until the drop is below it.",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="Number of calibration samples, each of another image. By default the set's own number.",
    )
    color_augmented: int = Field(
        default=0,
        ge=0,
        description="Number of further calibration samples in exchanged and saturated colours. They widen "
        "ranges: colours missing from the calibration images, such as pure yellow, would be clipped visibly.",
    )
    table: PathName | None = Field(
        default=None,
        description="Calibration table: used if the file exists, in place of calibrating; written if not.",
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
    """Tiling of images that are larger than the program's input."""

    overlap: int = Field(
        default=32,
        ge=0,
        description="Overlap of neighbouring tiles in pixels, across which they are blended; with too "
        "little, seams show. 0 for networks that take whole images.",
    )


class RouteSection(Section):
    """Split of a network into variants between which the host chooses per image."""

    capacity: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Size of the capacity variant of a network with masks, as a quantile: with 0.9 each of "
        "its layers holds the active positions of nine of ten calibration images. Images that do not fit "
        "run the dense variant. By default the network is not split.",
    )


class LimitSection(Section):
    """Limits of the checks; the build fails where one is not met."""

    exact: _FromZero = Field(
        default=1e-12,
        description="Largest error of the exact rewrites in float64, relative to the largest output.",
    )
    drop_db: _FromZero = Field(
        default=0.25, description="Largest PSNR drop from float32 to the deployed precision, in dB."
    )
    int8_share: _Share = Field(
        default=0.8, description="Least share of the convolutions' multiply-adds that runs in INT8."
    )
    device_levels: _FromZero = Field(
        default=0.25,
        description="Largest mean difference between the runtime and the exported program at fp32 and fp16, "
        "in 8-bit grey levels.",
    )
    sqnr_db: _FromZero = Field(
        default=15.0,
        description="Least signal-to-quantization-noise ratio of outputs without a truth (classify, "
        "keypoints, noisy photos without clean ones), in dB. Of a denoiser also of output minus input.",
    )
    predictions: _Share = Field(
        default=0.9, description="Least share of predictions (classes, keypoints) that deployment keeps."
    )
    accuracy_drop: _Share = Field(
        default=0.02,
        description="Largest drop of top-1 and of top-5 accuracy from float32 to the deployed precision, as "
        "a share of the validation photos (0.02: two of a hundred). Measured where the photos have labels.",
    )
    gate: _Share = Field(
        default=0.995, description="Least share of images whose variant stays the same after deployment."
    )
    mask_flips: _Share = Field(
        default=0.005, description="Largest share of mask positions that deployment flips."
    )
    flipped_margin: _FromZero = Field(
        default=0.25,
        description="Largest margin of a flipped decision: distance of its float logit to the threshold, in "
        "units of the rms distance.",
    )
