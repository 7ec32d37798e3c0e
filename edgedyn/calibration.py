"""Image sets with a noise model: what INT8 is calibrated on, and what everything is validated on.

    noisy = clean + sigma / 255 * n,  n ~ N(0, 1), clipped to [0, 1] only where the manifest says
    ``clip: true``

A manifest (``calib/<set>.yaml``) names each file with its sha256. The clipping rule is explicit, because a
network trained on clipped noise collapses on unclipped noise and the other way round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgedyn.errors import CalibrationError, ImageError
from edgedyn.imaging import IMAGE_SUFFIXES, read_image
from edgedyn.recipe import explain
from edgedyn.tasks import TASKS, Task, make_guide, shrink

_MOST_SAMPLES = 64  # of a folder, taken evenly; a manifest may ask for more


class NoiseSection(BaseModel):
    """What is added to a clean image; ``sigma`` on the 0..255 scale, cycled over the samples."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["gaussian", "none"] = "gaussian"
    sigma: list[float] = Field(default=[15.0, 25.0, 50.0], min_length=1)
    clip: bool = False

    def level(self, index: int, files: int) -> float:
        """Return the sigma of a sample; each file meets another one in each round over the files."""
        return self.sigma[(index % files + index // files) % len(self.sigma)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class SetManifest(BaseModel):
    """The YAML manifest; ``root`` is relative to it, or ``package:NAME/folder`` of an installed package."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    licence: str
    root: str
    samples: int = Field(default=12, ge=1)
    seed: int = 0
    noise: NoiseSection = NoiseSection()
    files: list[_File] = Field(min_length=1)


@dataclass(frozen=True)
class Sample:
    """What a network is given, made of one crop of a photo.

    Attributes:
        inputs: the noisy image (1, C, H, W) float32, and the guide of a joint network.
        truth: the crop in [0, 1]; what the output should be where the task has a truth.
        sigma: noise level, 0..255 scale.
        source: file name.
    """

    inputs: tuple[np.ndarray, ...]
    truth: np.ndarray
    sigma: float
    source: str

    @property
    def noisy(self) -> np.ndarray:
        """The noisy image, (1, C, H, W)."""
        return self.inputs[0]


@dataclass(frozen=True)
class CalibrationSet:
    """Hashed files, their licence, the noise model and how many crops are drawn."""

    name: str
    licence: str
    files: tuple[tuple[Path, str], ...]
    noise: NoiseSection
    samples: int
    seed: int

    def draw(self, shapes: Sequence[tuple[int, ...]], task: Task = TASKS["denoise"]) -> Iterator[Sample]:
        """Yield ``samples`` inputs of a program, made of crops of the photos, the same ones every time.

        Files are taken in turn; an image smaller than the crop is reflected at its border.

        Args:
            shapes: of the program's inputs, (1, C, H, W); a second one is the guide.
            task: what the program is for.

        Raises:
            CalibrationError: for a constant image: it carries no statistics.
        """
        for index in range(self.samples):
            path = self.files[index % len(self.files)][0]
            rng = np.random.default_rng([self.seed, index])
            _, channels, height, width = shapes[0]
            truth = _crop(_pixels(path, channels), height * task.scale, width * task.scale, rng)
            if truth.min() == truth.max():
                raise CalibrationError(
                    f"{path} is constant ({truth.min():.3f}) in the crop drawn from it; a set needs real "
                    "images. Remove the file from the set."
                )
            sigma = 0.0 if self.noise.kind == "none" else self.noise.level(index, len(self.files))
            clean = shrink(truth, task.scale)
            noisy = clean + np.float32(sigma / 255) * rng.standard_normal(clean.shape, dtype=np.float32)
            guides = [make_guide(truth, shape[1]) for shape in shapes[1:]]
            yield Sample((noisy.clip(0, 1) if self.noise.clip else noisy, *guides), truth, sigma, path.name)

    def digest(self) -> str:
        """Return the sha256 over file digests, noise model, number of samples and seed."""
        values = [[d for _, d in self.files], self.noise.model_dump(), self.samples, self.seed]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def open_set(path: Path) -> CalibrationSet:
    """Open a manifest, or a folder of images with the default noise model, at most 64 of them evenly taken.

    Raises:
        CalibrationError: when it does not exist, is empty, or a file is missing or differs from its sha256.
    """
    if path.is_dir():
        return _open_folder(path)
    try:
        manifest = SetManifest(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CalibrationError(
            f"image set {path} cannot be read ({error.strerror}); expected a manifest or a folder of images."
        ) from error
    except ValidationError as error:
        raise CalibrationError(f"image set {path}: {explain(error, SetManifest)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise CalibrationError(
            f"image set {path} is not a manifest: {error}. See calib/skimage.yaml."
        ) from error
    root = _root(manifest.root, path)
    files = tuple((root / file.name, file.sha256) for file in manifest.files)
    for file, expected in files:
        found = _sha256(file, path)
        if found != expected:
            raise CalibrationError(
                f"image set {path}: {file.name} has sha256 {found}, the manifest says {expected}. "
                "Fetch the file again, or write the new digest if you mean to use this one."
            )
    return CalibrationSet(
        manifest.name, manifest.licence, files, manifest.noise, manifest.samples, manifest.seed
    )


def refuse_overlap(calibration: CalibrationSet, validation: CalibrationSet) -> None:
    """Refuse sets that share a file: numbers measured on calibration images prove nothing.

    Raises:
        CalibrationError: naming the shared files.
    """
    seen = {digest: path for path, digest in calibration.files}
    shared = [f"{path.name} ({seen[digest].name})" for path, digest in validation.files if digest in seen]
    if shared:
        raise CalibrationError(
            f"calibration set {calibration.name!r} and validation set {validation.name!r} share "
            f"{len(shared)} files (by content): {', '.join(shared[:5])}. Take them out of one set."
        )


def _open_folder(path: Path) -> CalibrationSet:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise CalibrationError(
            f"image folder {path} holds no image ({len(list(path.iterdir()))} other entries); "
            f"expected files with a suffix of {', '.join(sorted(IMAGE_SUFFIXES))}. "
            "Put images there or name another folder."
        )
    taken = [files[i * len(files) // _MOST_SAMPLES] for i in range(_MOST_SAMPLES)]
    hashed = tuple((file, _sha256(file, path)) for file in dict.fromkeys(taken))
    return CalibrationSet(path.name, "not stated", hashed, NoiseSection(), max(12, len(hashed)), 0)


def _root(root: str, manifest: Path) -> Path:
    if not root.startswith("package:"):
        return manifest.parent / root
    package, _, folder = root.removeprefix("package:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CalibrationError(
            f"image set {manifest} needs the package {package!r}. Run: pip install {package}"
        )
    return Path(spec.submodule_search_locations[0]) / folder


def _sha256(file: Path, source: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CalibrationError(
            f"image set {source}: {file} cannot be read ({error.strerror}). Restore it."
        ) from error


def _pixels(path: Path, channels: int) -> np.ndarray:
    """Read an image as (H, W, channels) in [0, 1]; gray is repeated, colour is averaged."""
    try:
        pixels = read_image(path).pixels
    except ImageError as error:
        raise CalibrationError(
            f"{error} It belongs to an image set: remove it there, or replace it."
        ) from error
    if pixels.shape[2] == channels:
        return pixels
    return pixels.repeat(channels, axis=2) if pixels.shape[2] == 1 else pixels.mean(axis=2, keepdims=True)


def _crop(pixels: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    bottom, right = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    if bottom or right:
        pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="symmetric")
    top, left = rng.integers(pixels.shape[0] - height + 1), rng.integers(pixels.shape[1] - width + 1)
    crop = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(crop.transpose(2, 0, 1)[None], dtype=np.float32)
