"""The manifest of an image set, ``calib/<set>.yaml``: hashed files, licence, noise, labels, samples, seed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from edgedyn.errors import CalibrationError, nearest
from edgedyn.images.bayer import RawSection
from edgedyn.images.noise import NoiseSection
from edgedyn.reading import TextError
from edgedyn.sections import Section, Seed, explain, read_yaml_file

MOST_CLASSES = 2**31  # no network has more logits
_DIGEST = "^[0-9a-f]{64}$"


class CleanFile(Section):
    """The clean photo that belongs to a noisy one."""

    name: str = Field(description="Path, relative to the same folder as the `name` of the noisy photo.")
    sha256: str = Field(pattern=_DIGEST, description="SHA-256 that the file must have.")


class SetFile(Section):
    """One image of a set."""

    name: str = Field(description="Path, relative to its folder: a photo, .npy, .npz or .raw.")
    root: str | None = Field(default=None, description="Folder of this file, in place of the set's `root`.")
    sha256: str = Field(pattern=_DIGEST, description="SHA-256 that the file must have.")
    clean: CleanFile | None = Field(
        default=None,
        description="For noise of kind real: the same scene without noise, aligned pixel by pixel. Without "
        "it validation compares the device with float32, and has no PSNR. For all files, or for none.",
    )
    label: int | str | None = Field(
        default=None,
        description="Class of the photo, for the accuracy of the task classify: a name of `classes`, or the "
        "index of its logit, from 0. For all files, or for none.",
    )


class SetManifest(Section):
    """The manifest of an image set."""

    name: str = Field(description="Name of the set in reports.")
    licence: str = Field(description="Licence of the files.")
    root: str = Field(
        description="Folder of the files, relative to the manifest, or `package:NAME/folder` of an installed "
        "Python package."
    )
    samples: int = Field(
        default=12,
        ge=1,
        le=1_000_000,
        description="Number of crops, of the files in turn, or of evenly spaced files where there are more. "
        "With labels every file by default, and at most one sample per file.",
    )
    seed: Seed = Field(default=0, description="Random seed of the crops' positions and of the noise.")
    noise: NoiseSection = Field(description="Noise model: how a crop becomes the network's input.")
    raw: RawSection | None = Field(
        default=None, description="Layout and levels of .raw files; one sensor mode per set."
    )
    short_side: int | None = Field(
        default=None,
        ge=1,
        description="Pixels to which the shorter side of every image is reduced, before crops and noise. By "
        "default images keep their size.",
    )
    classes: list[str] = Field(
        default=[], description="Names of all classes, in the order of the network's logits."
    )
    files: list[SetFile] = Field(min_length=1, description="Images of the set.")

    @model_validator(mode="after")
    def _clean_files_are_of_real_noise(self) -> SetManifest:
        for file in self.files:
            if file.clean is not None and self.noise.kind != "real":
                raise ValueError(
                    f"{file.name} has a clean file, and the set's noise is {self.noise.kind!r}; expected "
                    "noise: {kind: real}"
                )
            if file.clean is not None and file.clean.sha256 == file.sha256:
                raise ValueError(f"{file.name} and its clean file {file.clean.name} are the same file")
        return self

    @model_validator(mode="after")
    def _real_noise_keeps_its_size(self) -> SetManifest:
        if self.noise.kind == "real" and self.short_side is not None:
            raise ValueError(
                f"short_side is {self.short_side}, and the set's noise is 'real', which resizing would "
                "reduce; expected no short_side"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_classes(self) -> SetManifest:
        if doubled := sorted({name for name in self.classes if self.classes.count(name) > 1}):
            raise ValueError(f"classes names {', '.join(doubled[:5])} twice; expected each class once")
        lacks = [file.name for file in self.files if file.label is None]
        if 0 < len(lacks) < len(self.files):
            raise ValueError(
                f"{len(lacks)} of {len(self.files)} files have no label ({', '.join(lacks[:3])}); expected a "
                "label for all files, or for none"
            )
        for file in self.files:
            known = self.classes if isinstance(file.label, str) else range(len(self.classes) or MOST_CLASSES)
            if file.label is not None and file.label not in known:
                hint = nearest(file.label, self.classes) if isinstance(file.label, str) else ""
                raise ValueError(
                    f"{file.name} has the label {file.label!r}; {hint}expected one of the "
                    f"{len(self.classes)} names of classes, or the index of a logit, from 0"
                )
        if not lacks and "samples" in self.model_fields_set and self.samples > len(self.files):
            raise ValueError(
                f"samples is {self.samples}, and {len(self.files)} labelled files give one sample each; "
                "expected at most that many"
            )
        return self

    @property
    def drawn(self) -> int:
        """Number of samples: every file by default where files have labels."""
        is_labelled = self.files[0].label is not None
        return len(self.files) if is_labelled and "samples" not in self.model_fields_set else self.samples

    def label_of(self, file: SetFile) -> int | None:
        """Return the index of a file's class among the logits; None without a label."""
        return self.classes.index(file.label) if isinstance(file.label, str) else file.label


def read_manifest(path: Path) -> SetManifest:
    """Read a manifest.

    Raises:
        CalibrationError: when the file cannot be read or is no manifest.
    """
    try:
        return SetManifest(**read_yaml_file(path))
    except OSError as error:
        raise CalibrationError(
            f"image set {path} cannot be read ({error.strerror}); expected a manifest or a folder of images."
        ) from error
    except ValidationError as error:
        raise CalibrationError(f"image set {path}: {explain(error, SetManifest)}") from error
    except TextError as error:
        raise CalibrationError(
            f"image set {path} is not a manifest: {error}. For an example see calib/skimage.yaml."
        ) from error


def find_folder(root: str, manifest: Path) -> Path:
    """Resolve a set's ``root``: relative to the manifest, or inside of an installed package.

    Raises:
        CalibrationError: when the package is not installed.
    """
    if not root.startswith("package:"):
        return manifest.parent / root
    package, _, folder = root.removeprefix("package:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CalibrationError(
            f"image set {manifest} needs the package {package!r}. Run: pip install {package}"
        )
    return Path(spec.submodule_search_locations[0]) / folder
