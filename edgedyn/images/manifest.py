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

    name: str = Field(description="relative to the folder of the noisy photo")
    sha256: str = Field(pattern=_DIGEST, description="digest that the file must have")


class SetFile(Section):
    """One image of a set."""

    name: str = Field(description="relative to its folder; PNG, JPEG, TIFF, .npy, .npz or .raw")
    root: str | None = Field(default=None, description="its folder, where that is not the manifest's root")
    sha256: str = Field(pattern=_DIGEST, description="digest that the file must have")
    clean: CleanFile | None = Field(
        default=None,
        description="noise kind real: the same scene without noise, pixel on pixel; a set to validate on "
        "needs it, one to calibrate on does not",
    )


class SetManifest(Section):
    """The YAML manifest."""

    name: str = Field(description="of the set, for reports")
    licence: str = Field(description="of the files")
    root: str = Field(
        description="folder of the files, relative to the manifest; or package:NAME/folder, installed"
    )
    samples: int = Field(default=12, ge=1, description="crops to draw; files are taken in turn")
    seed: int = Field(default=0, description="of where crops lie, and of the noise")
    noise: NoiseSection = Field(description="what makes the network's input of a file")
    raw: RawSection | None = Field(default=None, description="how .raw files are read; one sensor mode a set")
    short_side: int | None = Field(
        default=None,
        ge=1,
        description="preprocessing: pixels that the shorter side of every image is reduced to, before crops "
        "and noise; by default images are taken as large as they are",
    )
    files: list[SetFile] = Field(min_length=1, description="the images")

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
                f"short_side is {self.short_side}, and the set's noise is 'real', of which resizing takes "
                "some away; expected no short_side"
            )
        return self


def read_manifest(path: Path) -> SetManifest:
    """Read a manifest.

    Raises:
        CalibrationError: when it cannot be read, or is none.
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
            f"image set {path} is not a manifest: {error}. See calib/skimage.yaml."
        ) from error


def find_folder(root: str, manifest: Path) -> Path:
    """Return the folder that a root is, a relative one from the manifest's.

    Raises:
        CalibrationError: when it is of a package that is not installed.
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
