"""The manifest of a folder of images, written with the digest of every file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgedyn.errors import CalibrationError, UsageError
from edgedyn.files import replace_file
from edgedyn.images.folder import FolderImage, Listing, list_folder
from edgedyn.images.image_set import hash_file
from edgedyn.images.manifest import SetManifest
from edgedyn.reading import TextError, read_text
from edgedyn.sections import dump_yaml, explain

_LEAST_SAMPLES = 12


def make_manifest(
    folder: Path,
    out: Path,
    *,
    beside: Path | None = None,
    values: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> SetManifest:
    """Write the manifest of a folder: its images, their clean photos or classes, and the digest of each.

    Args:
        folder: images, by the rules of ``edgedyn.images.folder``.
        out: the manifest, a YAML file; the paths in it are relative, so folder and manifest move together.
        beside: folder of clean photos, or CSV file of file,class.
        values: keys of the manifest in place of the found ones; ``classes`` may name a file of one class per
            line.
        force: replace an existing file.
        progress: called with ("hash", files done, files).

    Raises:
        UsageError: when ``out`` exists, unless ``force``, or cannot be written.
        CalibrationError: when the folder is refused, a file cannot be read, or a value does not fit.
    """
    if os.path.exists(out) and not force:
        raise UsageError(f"{out} exists already. Choose another file with -o, or pass --force.")
    if not os.path.isdir(folder):
        raise CalibrationError(f"{folder} is no folder; expected the folder of the images. Check the path.")
    given = dict(values or {})
    if isinstance(given.get("classes"), str):
        given["classes"] = _read_classes(Path(given["classes"]))
    listing = list_folder(folder, beside, given.get("classes") or ())
    found: dict[str, Any] = {
        "name": out.stem,
        "licence": "not stated",
        "root": _relative(folder, out.parent),
        "noise": listing.noise.to_json(),
    }
    if listing.images[0].label is None:
        found["samples"] = max(_LEAST_SAMPLES, len(listing.images))
    if listing.classes:
        found["classes"] = list(listing.classes)
    numbers = (f"{number:064x}" for number in itertools.count())
    try:
        # the values are checked before many files are read
        SetManifest(
            **{**found, **given, "files": list(_entries(listing, folder, lambda file: next(numbers)))}
        )
        files = []
        for entry in _entries(listing, folder, lambda file: hash_file(file, folder)):
            files.append(entry)
            progress("hash", len(files), len(listing.images))
        everything = {**found, **given, "files": files}
        manifest = SetManifest(**everything)
        data = dump_yaml(everything).encode()
    except ValidationError as error:
        raise CalibrationError(f"image set {out}: {explain(error, SetManifest)}") from error
    except (TypeError, UnicodeEncodeError) as error:  # a key that is no text, a file name that is not UTF-8
        raise CalibrationError(f"image set {out}: {error}. Rename the file, or fix the key.") from error
    replace_file(out, data)
    return manifest


def _entries(listing: Listing, folder: Path, digest: Callable[[Path], str]) -> Iterator[dict[str, Any]]:
    for image in listing.images:
        entry: dict[str, Any] = {"name": _relative(image.path, folder), "sha256": digest(image.path)}
        if image.clean is not None:
            entry["clean"] = {"name": _relative(image.clean, folder), "sha256": digest(image.clean)}
        if image.label is not None:
            entry["label"] = _label(image, listing)
        yield entry


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _label(image: FolderImage, listing: Listing) -> int | str | None:
    is_named = listing.classes and image.label is not None
    return listing.classes[image.label or 0] if is_named else image.label


def _read_classes(file: Path) -> list[str]:
    try:
        lines = read_text(file).splitlines()
    except (OSError, TextError) as error:
        raise CalibrationError(
            f"classes: {file} cannot be read ({error}); expected a text file of one class per line."
        ) from error
    return [line.strip() for line in lines if line.strip()]
