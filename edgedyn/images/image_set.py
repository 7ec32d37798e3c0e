"""Image sets with a noise model, for calibration and for validation.

    a manifest (calib/<set>.yaml), a folder, or any iterable of images: ``CalibrationSet.of``
    sample = image [resized] -> crop -> shrunk by the task -> noise (``edgedyn.images.noise``)
    labelled image, of a task that predicts: resized -> crop around the centre (``edgedyn.images.framing``)

Every image is identified by its sha256, and a set draws the same samples every time. Images that prove
nothing are refused: constant ones, random values, and images that calibration and validation share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedyn.errors import CalibrationError
from edgedyn.images.bayer import RawSection
from edgedyn.images.crops import (
    CORRELATED,
    augment_colors,
    correlate,
    draw_crops,
    random_error,
    refuse_constant,
    refuse_dark,
)
from edgedyn.images.folder import list_folder
from edgedyn.images.framing import frame, resize
from edgedyn.images.manifest import SetManifest, find_folder, read_manifest
from edgedyn.images.noise import NO_NOISE, NoiseSection
from edgedyn.images.pixels import unpack, with_channels
from edgedyn.images.sample import Sample, SetImage
from edgedyn.images.tasks import TASKS, Task, make_guide, shrink
from edgedyn.reading import MAX_FILE_BYTES, read_bytes

MOST_SAMPLES = 64  # images of a folder, taken evenly; a manifest or a recipe may set more


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Hashed images with their licence, noise model and number of samples.

    Attributes:
        samples: number of crops to draw.
        color_augmented: number of further crops, in exchanged and saturated colours.
        short_side: pixels to which the shorter side of every image is resized; None keeps the images' size.
        classes: class names, in the order of the logits; empty where the set gives none.
    """

    name: str
    licence: str
    images: tuple[SetImage, ...]
    noise: NoiseSection
    samples: int
    seed: int = 0
    raw: RawSection | None = None
    color_augmented: int = 0
    short_side: int | None = None
    classes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        images: Iterable[Any],
        *,
        samples: int = 32,
        transform: Callable[[Any], Any] = lambda item: item,
        noise: NoiseSection = NO_NOISE,
        name: str = "images",
        licence: str = "not stated",
        seed: int = 0,
    ) -> CalibrationSet:
        """Return a set of the first images of an iterable, for instance of a PyTorch DataLoader.

        The images stay in memory, and the set's digest is the digest of their pixels.

        Args:
            images: images, arrays or tensors, or batches (B, C, H, W) of them; see ``edgedyn.images.pixels``.
            samples: number of images, one sample each; the iteration stops after them.
            transform: function from an item to an image or a batch, for instance ``lambda batch: batch[0]``.
            noise: noise to add; by default none, the images are the network's inputs.
            name: name of the set in reports.
            licence: licence of the images.
            seed: random seed of the crops' positions and of the noise.

        Raises:
            CalibrationError: when there are fewer images, or an item is no image.
        """
        taken: list[SetImage] = []
        for index, item in enumerate(images):
            for pixels in unpack(transform(item), f"item {index} of the set {name!r}"):
                taken.append(SetImage(Path(f"{name}[{len(taken)}]"), digest_pixels(pixels), pixels=pixels))
            if len(taken) >= samples:
                break
        if len(taken) < samples or samples < 1:
            raise CalibrationError(
                f"the set {name!r} has {len(taken)} images; expected {samples}, one per sample, and at least "
                "one. Pass more images, or a smaller samples=..."
            )
        return cls(name, licence, tuple(taken[:samples]), noise, samples, seed)

    @property
    def files(self) -> tuple[tuple[Path, str], ...]:
        """Path and digest of every image, clean ones included."""
        every = (x for image in self.images for x in (image, image.clean) if x is not None)
        return tuple((image.path, image.sha256) for image in every)

    @property
    def has_truth(self) -> bool:
        """Whether the ideal output is known: each noisy photo has a clean one."""
        return self.noise.kind != "real" or all(image.clean is not None for image in self.images)

    def draw(self, shapes: Sequence[tuple[int, ...]], task: Task = TASKS["denoise"]) -> Iterator[Sample]:
        """Yield the samples of a program, made of crops of the photos; every call yields the same ones.

        Files are taken in turn, or evenly if there are more of them than samples. An image smaller than the
        crop is reflected at its border.

        Args:
            shapes: shapes of the program's inputs, (1, C, H, W); a second one is the guide.
            task: task of the program.

        Raises:
            CalibrationError: for an image that cannot be read, is too small for ``short_side``, constant, or
                random; for a clean photo of another size. Where images may be noisy themselves (kind none, or
                real without clean photos), random ones are refused only if all are: flat noise looks random.
                Also for a set that is almost black.
        """
        _, channels, height, width = shapes[0]
        correlations: dict[Path, float] = {}
        brightest = 0.0
        for index in range(self.samples + self.color_augmented):
            is_augmented = index >= self.samples
            place, samples = (
                (index - self.samples, self.color_augmented) if is_augmented else (index, self.samples)
            )
            image = self._image(place, samples)
            rng = np.random.default_rng([self.seed, index])
            photo, truth = self._pixels(image, channels)
            if image.path not in correlations:
                correlations[image.path] = correlate(truth)
                brightest = max(brightest, float(truth.max()))
                self._refuse_random(image, correlations[image.path])
            photo, truth = self._crops(image, photo, truth, (height, width), task, rng)
            if is_augmented:
                photo = truth = augment_colors(truth, rng)
            for pixels, source in ((photo, image), (truth, image.clean or image)):
                refuse_constant(pixels, source.path)
            clean = shrink(photo, task.scale)
            noisy, sigma, name = self.noise.add(clean, index, len(self.images), rng)
            if image.clean is not None:
                sigma = 255 * float(np.sqrt(np.mean((noisy - shrink(truth, task.scale)) ** 2)))
            guides = [make_guide(truth, shape[1]) for shape in shapes[1:]]
            has_truth = task.has_truth and (self.noise.kind != "real" or image.clean is not None)
            facts = (has_truth, image.label, self.classes, self.short_side)
            yield Sample((noisy, *guides), truth, sigma, image.path.name, name, *facts)
        if max(correlations.values()) < CORRELATED:
            raise random_error(f"every image of the set {self.name!r}", max(correlations.values()))
        refuse_dark(brightest, self.name)

    def _image(self, index: int, samples: int) -> SetImage:
        count = len(self.images)
        return self.images[index * count // samples if samples < count else index % count]

    def _pixels(self, image: SetImage, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the photo to which noise is added, and the truth; they differ for noisy photos only."""
        photo = with_channels(image.read(self.raw), channels)
        if image.clean is None:
            return photo, photo
        truth = with_channels(image.clean.read(self.raw), channels)
        if truth.shape != photo.shape:
            raise CalibrationError(
                f"{image.path} is {_size(photo)} and its clean file {image.clean.path} is {_size(truth)}; "
                "expected the same scene, aligned pixel by pixel. Crop both alike."
            )
        return photo, truth

    def _crops(
        self,
        image: SetImage,
        photo: np.ndarray,
        truth: np.ndarray,
        size: tuple[int, int],
        task: Task,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the crops of photo and truth: of a labelled image the centre, else a random place."""
        if image.label is not None and task.predictions is not None:
            framed = frame(photo, size, self.short_side).pixels
            is_clean = image.clean is None
            return framed, framed if is_clean else frame(truth, size, self.short_side).pixels
        if self.short_side is not None:  # then no image has a clean one
            photo = truth = self._reduce(image, truth, self.short_side)
        photo, truth = draw_crops((photo, truth), (size[0] * task.scale, size[1] * task.scale), rng)
        return photo, truth

    def _refuse_random(self, image: SetImage, correlation: float) -> None:
        is_clean = self.noise.is_added or image.clean is not None
        if is_clean and correlation < CORRELATED:
            raise random_error(str((image.clean or image).path), correlation)

    def _reduce(self, image: SetImage, pixels: np.ndarray, short_side: int) -> np.ndarray:
        if min(pixels.shape[:2]) < short_side:
            raise CalibrationError(
                f"{image.path} is {_size(pixels)}, and short_side of the set {self.name!r} is {short_side}: "
                "an enlarged photo has no details. Remove the file, or make short_side smaller."
            )
        return resize(pixels, short_side)

    def digest(self) -> str:
        """Return the sha256 of image digests, noise, numbers of samples, seed and preprocessing."""
        pairs = [[image.sha256, image.clean and image.clean.sha256] for image in self.images]
        raw = self.raw and self.raw.model_dump()
        values = [pairs, self.noise.to_json(), self.samples, self.color_augmented, self.seed, raw]
        values += [self.short_side] if self.short_side is not None else []
        labels = [image.label for image in self.images]
        values += [labels] if any(label is not None for label in labels) else []
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def with_values(
        self,
        *,
        noise: NoiseSection | float | None = None,
        samples: int | None = None,
        color_augmented: int = 0,
    ) -> CalibrationSet:
        """Return the set with a user's values in place of its own.

        Args:
            noise: noise model, or the level of the set's Gaussian noise on the 0..255 scale; None keeps the
                set's own.
            samples: number of samples, each of another image; None keeps the set's own.
            color_augmented: further samples of exchanged and saturated colours.

        Raises:
            CalibrationError: as ``with_noise``, ``take`` and ``with_color_augmented``.
            pydantic.ValidationError: when the level is negative or not finite.
        """
        if isinstance(noise, float):
            noise = self.noise.at_level(noise)
        adapted = self if noise is None else self.with_noise(noise)
        adapted = adapted if samples is None else adapted.take(samples)
        return adapted.with_color_augmented(color_augmented)

    def with_noise(self, noise: NoiseSection) -> CalibrationSet:
        """Return the set with another noise model; noisy photos are replaced by their clean ones.

        Raises:
            CalibrationError: for real noise on a set of clean photos, or other noise on a set without them.
        """
        if noise.kind == "real" and self.noise.kind != "real":
            raise CalibrationError(
                f"the recipe's noise is 'real', and the set {self.name!r} has noise of kind "
                f"{self.noise.kind!r}: no noisy photos. Name another set, or remove noise: from the recipe."
            )
        if noise.kind == self.noise.kind or self.noise.kind != "real":
            return replace(self, noise=noise)
        clean = tuple(image.clean for image in self.images if image.clean is not None)
        if len(clean) < len(self.images):
            raise CalibrationError(
                f"the recipe's noise is {noise.kind!r}, and {len(self.images) - len(clean)} noisy photos of "
                f"the set {self.name!r} have no clean file to add it to. Add clean: to the manifest, or "
                "remove noise: from the recipe."
            )
        return replace(self, images=clean, noise=noise)

    def with_color_augmented(self, samples: int) -> CalibrationSet:
        """Return the set with this number of further samples, in exchanged and saturated colours.

        Raises:
            CalibrationError: for a set of noisy photos, whose noise would change with the colours.
        """
        if samples and not self.noise.is_added:
            raise CalibrationError(
                "quantize.color_augmented changes the colours of clean photos before noise is added, and the "
                f"set {self.name!r} has noise of kind {self.noise.kind!r}. Set quantize.color_augmented: 0."
            )
        return replace(self, color_augmented=samples)

    def fresh(self, k: int) -> CalibrationSet:
        """Return the set with other crops and noise (seed + k), without colour-augmented samples."""
        return replace(self, seed=self.seed + k, color_augmented=0)

    def take(self, samples: int) -> CalibrationSet:
        """Return the set with this number of samples, each of another image.

        Raises:
            CalibrationError: when the set has fewer different images.
        """
        distinct = tuple({image.sha256: image for image in self.images}.values())
        if len(distinct) < samples:
            raise CalibrationError(
                f"the recipe has {samples} calibration samples, each of another image (quantize.samples), "
                f"and the set {self.name!r} has {len(distinct)} different images. Add images, or take fewer: "
                f"--set quantize.samples={len(distinct)}."
            )
        return replace(self, images=distinct, samples=samples)


def open_set(
    path: Path,
    *,
    noise: NoiseSection | float | None = None,
    samples: int | None = None,
    color_augmented: int = 0,
) -> CalibrationSet:
    """Open a manifest or a folder of images, with the values of ``CalibrationSet.with_values``.

    A folder has the noise and labels that ``edgedyn.images.folder`` finds; at most ``MOST_SAMPLES`` or
    ``samples`` of its images are taken, evenly.

    Raises:
        CalibrationError: when the set does not exist, is empty or contradicts the values, or a file is
            missing or differs from its sha256.
    """
    most = max(MOST_SAMPLES, samples or 0)
    opened = _open_folder(path, most) if os.path.isdir(path) else _open_manifest(path)
    return opened.with_values(noise=noise, samples=samples, color_augmented=color_augmented)


def _open_manifest(path: Path) -> CalibrationSet:
    manifest = read_manifest(path)
    opened = _set_of(manifest, path)
    for image, expected in opened.files:
        actual = hash_file(image, path)
        if actual != expected:
            raise CalibrationError(
                f"image set {path}: {image.name} has sha256 {actual}; expected {expected} as in the manifest."
                " Fetch the file again, or write its digest into the manifest."
            )
    return opened


def _set_of(manifest: SetManifest, path: Path) -> CalibrationSet:
    images = []
    for file in manifest.files:
        folder = find_folder(file.root or manifest.root, path)
        label = manifest.label_of(file)
        clean = SetImage(folder / file.clean.name, file.clean.sha256, label=label) if file.clean else None
        images.append(SetImage(folder / file.name, file.sha256, clean, label=label))
    return CalibrationSet(
        manifest.name,
        manifest.licence,
        tuple(images),
        manifest.noise,
        manifest.drawn,
        manifest.seed,
        manifest.raw,
        short_side=manifest.short_side,
        classes=tuple(manifest.classes),
    )


def _open_folder(path: Path, most: int) -> CalibrationSet:
    listing = list_folder(path)
    found = listing.images
    taken = dict.fromkeys(found[i * len(found) // most] for i in range(most))
    images = tuple(
        SetImage(
            image.path,
            hash_file(image.path, path),
            SetImage(image.clean, hash_file(image.clean, path)) if image.clean else None,
            label=image.label,
        )
        for image in taken
    )
    samples = len(images) if images[0].label is not None else max(12, len(images))
    return CalibrationSet(path.name, "not stated", images, listing.noise, samples, classes=listing.classes)


def hash_file(file: Path, source: Path) -> str:
    """Return a file's sha256.

    Raises:
        CalibrationError: naming the set ``source``, when the file cannot be read.
    """
    try:
        return hashlib.sha256(read_bytes(file, MAX_FILE_BYTES)).hexdigest()
    except OSError as error:
        raise CalibrationError(
            f"image set {source}: {file} cannot be read ({error.strerror}). Restore it."
        ) from error


def digest_pixels(pixels: np.ndarray) -> str:
    """Return the sha256 of an image in memory: of its shape and pixels."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
