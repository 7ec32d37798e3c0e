"""The manifest of an image set, ``calib/<set>.yaml``: hashed files, licence, noise, samples, seed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from edgedyn.errors import CalibrationError
from edgedyn.images.bayer import RawSection
from edgedyn.images.noise import NoiseSection
from edgedyn.sections import Section, explain, read_yaml

_DIGEST = "^[0-9a-f]{64}$"


class CleanFile(Section):
    """The clean photo that belongs to a noisy one."""

    name: str = Field(description="Path, relative to the same folder as the `name` of the noisy photo.")
    sha256: str = Field(pattern=_DIGEST, description="SHA-256 that the file must have.")


class SetFile(Section):
    """One image of a set."""

    name: str = Field(description="Path, relative to its folder: PNG, JPEG, TIFF, .npy, .npz or .raw.")
    root: str | None = Field(default=None, description="Folder of this file, in place of the set's `root`.")
    sha256: str = Field(pattern=_DIGEST, description="SHA-256 that the file must have.")
    clean: CleanFile | None = Field(
        default=None,
        description="For noise of kind real: the same scene without noise, aligned pixel by pixel. Required "
        "for validation, not for calibration.",
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
        description="Number of crops, of the files in turn, or of evenly spaced files where there are more.",
    )
    seed: int = Field(default=0, description="Random seed of the crops' positions and of the noise.")
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


def read_manifest(path: Path) -> SetManifest:
    """Read a manifest.

    Raises:
        CalibrationError: when the file cannot be read or is no manifest.
    """
    try:
        return SetManifest(**read_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CalibrationError(
            f"image set {path} cannot be read ({error.strerror}); expected a manifest or a folder of images."
        ) from error
    except ValidationError as error:
        raise CalibrationError(f"image set {path}: {explain(error, SetManifest)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
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
