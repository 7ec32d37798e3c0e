"""Noise models of an image set: from a clean image x in [0, 1] to the network's input y.

    gaussian           y = x + sigma / 255 * n                          n ~ N(0, 1)
    poisson-gaussian   y = gain * Poisson(x / gain) + read_noise * n    Var[y] = gain * x + read_noise^2
    real               y is a noisy photo, x a clean one of the same scene, if the set has one
    none               y = x

Poisson-Gaussian is Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for single-image
raw-data", IEEE TIP 17(10), 2008: their a is ``gain``, their b is ``read_noise`` squared.

Every set states whether y is clipped to [0, 1]: a network trained on clipped noise collapses on unclipped
noise, and the other way round.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from edgedyn.sections import Section

_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# kind -> alternative groups of keys; a section must have exactly one whole group
_KEYS: dict[str, list[set[str]]] = {
    "gaussian": [{"sigma", "clip"}, {"sigma_range", "clip"}],
    "poisson-gaussian": [{"gain", "read_noise", "clip"}],
    "real": [set()],
    "none": [set()],
}
_CLIP_HINT = (
    "; clip: true clips noisy values to [0, 1], clip: false keeps them: set it as in the network's training"
)


class NoiseSection(Section):
    """Noise of an image set; lists of levels are cycled, so that each file meets each level."""

    kind: Literal["gaussian", "poisson-gaussian", "real", "none"] = Field(
        default="gaussian",
        description="Noise model. gaussian, poisson-gaussian: noise is added to clean photos; real: the "
        "photos of the set are noisy themselves; none: no noise.",
    )
    sigma: list[_Finite] | None = Field(
        default=None,
        min_length=1,
        description="Standard deviations of gaussian noise, 0..255 scale, in turn over the samples.",
    )
    sigma_range: list[_Finite] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="Range [low, high] in place of `sigma`: one level per sample, drawn uniformly.",
    )
    gain: list[_Positive] | None = Field(
        default=None,
        min_length=1,
        description="Variance of the shot noise at white of poisson-gaussian noise, 0..1 scale: one "
        "value per sensor setting, in turn over the samples.",
    )
    read_noise: list[_Finite] | None = Field(
        default=None,
        min_length=1,
        description="Standard deviation in the dark of poisson-gaussian noise, 0..1 scale: one per gain.",
    )
    clip: bool | None = Field(
        default=None,
        description="Whether noisy values are clipped to [0, 1], as in the network's training. Required for "
        "noise that is added.",
    )

    @model_validator(mode="after")
    def _has_the_keys_of_its_kind(self) -> NoiseSection:
        keys = {key for key in type(self).model_fields if getattr(self, key) is not None} - {"kind"}
        if keys not in _KEYS[self.kind]:
            expected = " or ".join(", ".join(sorted(group)) or "nothing else" for group in _KEYS[self.kind])
            actual = ", ".join(sorted(keys)) or "nothing else"
            hint = "" if "clip" in keys or not self.is_added else _CLIP_HINT
            raise ValueError(f"noise of kind {self.kind!r} has {actual}; expected {expected}{hint}")
        if self.sigma_range is not None and self.sigma_range[0] >= self.sigma_range[1]:
            raise ValueError(f"sigma_range is {self.sigma_range}; expected [low, high] with low < high")
        if len(self.gain or ()) != len(self.read_noise or ()):
            raise ValueError(
                f"gain has {len(self.gain or ())} values and read_noise {len(self.read_noise or ())}; "
                "expected one read_noise for each gain"
            )
        return self

    @property
    def is_added(self) -> bool:
        """Whether noise is generated and added to clean images."""
        return self.kind in ("gaussian", "poisson-gaussian")

    def at_level(self, sigma: float) -> NoiseSection:
        """Return Gaussian noise of one level, clipped as before; noise of other kinds stays as it is."""
        return NoiseSection(sigma=[sigma], clip=self.clip) if self.kind == "gaussian" else self

    def to_json(self) -> dict[str, object]:
        """Return the keys that are set."""
        return self.model_dump(exclude_none=True)

    def add(
        self, clean: np.ndarray, index: int, files: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, float, str]:
        """Add noise to a clean image.

        Args:
            clean: image, float32.
            index: number of the sample; each file meets another level in each round over the files.
            files: number of files in the set.
            rng: random generator of the sample.

        Returns:
            The noisy image, float32; its sigma on the 0..255 scale, of Poisson-Gaussian noise the root mean
            square over this image, 0 where no noise is added; and the condition that rows of a report state:
            ``sigma=25``, ``sigma=5..50``, ``gain=0.01,read_noise=0.002`` or ``real``.
        """
        turn = index % files + index // files
        if not self.is_added:
            return clean, 0.0, "real" if self.kind == "real" else "sigma=0"
        if self.gain is not None and self.read_noise is not None:
            gain, read = self.gain[turn % len(self.gain)], self.read_noise[turn % len(self.read_noise)]
            light = clean.clip(0).astype(np.float64)  # a raw frame is below black where it is noisy itself
            shot = gain * rng.poisson(light / gain) - light
            noisy = clean + (shot + read * rng.standard_normal(clean.shape)).astype(np.float32)
            sigma = 255 * float(np.sqrt(np.mean(gain * light) + read**2))
            name = f"gain={gain:g},read_noise={read:g}"
        else:
            sigma, name = self._level(turn, rng)
            noisy = clean + np.float32(sigma / 255) * rng.standard_normal(clean.shape, dtype=np.float32)
        return noisy.clip(0, 1) if self.clip else noisy, sigma, name

    def _level(self, turn: int, rng: np.random.Generator) -> tuple[float, str]:
        if self.sigma is not None:
            sigma = self.sigma[turn % len(self.sigma)]
            return sigma, f"sigma={sigma:g}"
        low, high = self.sigma_range or (0.0, 0.0)
        return float(rng.uniform(low, high)), f"sigma={low:g}..{high:g}"


# the default for a folder of images, which has no manifest; the report shows it
FOLDER_NOISE = NoiseSection(sigma=[15.0, 25.0, 50.0], clip=False)
NO_NOISE = NoiseSection(kind="none")
