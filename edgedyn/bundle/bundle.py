"""A bundle: one directory with a program, its data, and a manifest with the digest of every byte.

    manifest.json   its serialization and its rules: ``edgedyn/bundle/manifest.py``
    model.pte ...   every other file, listed with size and sha256; no unlisted file is allowed
    vectors/        the one folder: inputs and expected outputs, ``.npy`` without pickle

Opening fails closed. The digests find damage and mix-ups but are no signature: whoever can write the
directory can write a matching manifest. Device side: standard library only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedyn.bundle.manifest import (
    MANIFEST,
    VECTOR_KEYS,
    VECTORS,
    Routing,
    canonical,
    check_files,
    describe_file,
    list_files,
    listed_names,
    read_manifest,
    refusal,
    seal,
    tensor_specs,
)
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.errors import BundleError, UsageError
from edgedyn.files import replace_file, sibling, staging_folder, sync


@dataclass(frozen=True)
class Vector:
    """One validation vector: files of inputs and expected output, and the error allowed to a device.

    Attributes:
        inputs: for each input the name of a ``.npy`` in the bundle, of its shape and dtype.
        outputs: for each output the name of such a file.
        max_abs: per output, the largest allowed difference at any element, in units of the output.
        rms: per output, the largest allowed root mean square of the differences.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_abs: tuple[float, ...]
    rms: tuple[float, ...]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its directory and the parsed manifest, both read-only.

    Only ``open_bundle``, ``write_bundle`` and ``add_files`` make one.
    """

    path: Path
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        """Return one line: name, target, precision, verdict and place."""
        return f"Bundle({self.summary}, {self.path})"

    @property
    def summary(self) -> str:
        """Name, target, precision and verdict in a few words."""
        verdict = "passed" if self.ok else "failed"
        return f"{self.manifest['name']}, {self.target} {self.precision}, {verdict}"

    @property
    def ok(self) -> bool:
        """Whether every check of the build passed."""
        return bool(self.manifest["ok"])

    @property
    def target(self) -> str:
        """Name of the target that the program was lowered to."""
        return str(self.manifest["target"])

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``."""
        return str(self.manifest["precision"])

    @property
    def programs(self) -> dict[str, str]:
        """Program -> file: ``forward`` alone, or a router and its variants."""
        return dict(self.manifest["programs"])

    @property
    def routing(self) -> Routing | None:
        """Rule that chooses a variant; None where there is one program."""
        return Routing.from_json(self.manifest["routing"])

    @property
    def inputs(self) -> list[TensorSpec]:
        """Inputs of the program, in order."""
        return tensor_specs(self.manifest["inputs"])

    @property
    def outputs(self) -> list[TensorSpec]:
        """Outputs of the program, in order."""
        return tensor_specs(self.manifest["outputs"])

    @property
    def overlap(self) -> int:
        """Least number of pixels that neighbouring tiles share."""
        return int(self.manifest["tile"]["overlap"])

    @property
    def predictions(self) -> dict[str, Any]:
        """Task, shorter side and class names of a bundle that predicts; empty for one of pictures."""
        return dict(self.manifest.get("predictions", {}))

    @property
    def vectors(self) -> list[Vector]:
        """The validation vectors."""
        vectors = self.manifest["vectors"]
        return [Vector(**{key: tuple(vector[key]) for key in VECTOR_KEYS}) for vector in vectors]


def open_bundle(path: str | Path, *, rebuilt: Collection[str] = ()) -> Bundle:
    """Verify the bundle in the directory ``path``, every byte of it, and open it.

    Files that an interrupted ``add_files`` left beside it are moved in first.

    Args:
        path: the directory.
        rebuilt: names of files that the caller is about to replace with ``add_files``; they may be missing,
            changed or unlisted.

    Raises:
        BundleError: if it is no bundle, or anything in it is not as its manifest says.
        UsageError: if an interrupted addition cannot be finished, for instance on a read-only disk.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise refusal(path, "the path", "no directory", "the directory of a bundle", "Check the path.")
    _finish_adding(path)
    manifest = read_manifest(path)
    check_files(path, manifest["files"], rebuilt=rebuilt)
    return Bundle(path, manifest)


def engine_names(path: Path) -> set[str]:
    """Return the names of the engines in a bundle, on disk or in its manifest; compiling replaces them."""
    names = {file.name for file in path.glob("*")} if path.is_dir() else set()
    listed = listed_names(path) if MANIFEST in names else set()
    return {name for name in names | listed if name.endswith(".engine")}


def refuse_existing(out: Path, *, force: bool = False) -> None:
    """Refuse to write over ``out``. Call it before long work; ``write_bundle`` calls it again.

    Raises:
        UsageError: if ``out`` exists; with ``force`` unless it is empty or a bundle and nothing else.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{out} exists already; expected a new path. Choose one, or use --force.")
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} is no directory, and --force replaces only bundles. Choose another path.")
    if not any(out.iterdir()):
        return
    try:
        strangers = list_files(out) - {MANIFEST, *listed_names(out)}
    except BundleError as error:
        raise UsageError(f"{out} is no bundle, and --force replaces only bundles: {error}") from error
    if strangers:
        raise UsageError(f"{out} also holds {sorted(strangers)}, which --force would delete. Move it away.")


def write_bundle(out: Path, staging: Path, manifest: dict[str, Any], *, force: bool = False) -> Bundle:
    """Turn the files in ``staging`` into the bundle ``out``: complete, verified and synced, or not there.

    Args:
        staging: from ``staging_folder(out)``, holding every file but the manifest; it is gone afterwards.
        manifest: everything but ``files`` and ``manifest_sha256``; plain JSON values.
        force: replace the bundle at ``out``, after the new one is complete. Between the two renames that this
            takes, a power cut leaves the old one as a hidden sibling ``.<name>.old-...``.

    Raises:
        UsageError: if ``out`` may not be written (``refuse_existing``).
        BundleError: if the staged files or the manifest would not open as a bundle. ``out`` is untouched.
    """
    names = list_files(staging)
    complete = {**manifest, "files": {name: describe_file(staging / name) for name in names}}
    sync(*(staging / name for name in names))
    replace_file(staging / MANIFEST, canonical(seal(complete)))
    bundle = open_bundle(staging)
    sync(*(path for path in (staging / VECTORS, staging) if path.is_dir()))
    refuse_existing(out, force=force)
    _publish(staging, out)
    return replace(bundle, path=out)


def add_files(bundle: Bundle, files: Sequence[Path]) -> Bundle:
    """Move files into the bundle, under their own names, and list them in the manifest.

    They are complete in a hidden folder beside the bundle, with the new manifest, before the first one moves;
    whoever opens the bundle after an interruption moves the rest. So a power cut at any time leaves the old
    bundle or one that opens as the new one.

    Args:
        bundle: the bundle. Where it has files of these names already, it must be opened with the names in
            ``rebuilt``.
        files: on the bundle's file system, made in a ``staging_folder``.

    Raises:
        BundleError: if a name is not plain, or the rest of the bundle is not as it was.
        UsageError: if they cannot be written.
    """
    added = {file.name: describe_file(file) for file in files}
    listed = {**bundle.manifest["files"], **added}
    check_files(bundle.path, listed, rebuilt=added)
    manifest = seal({**bundle.manifest, "files": listed})
    with staging_folder(bundle.path.resolve()) as staging:
        for file in files:
            file.replace(staging / file.name)
        (staging / MANIFEST).write_bytes(canonical(manifest))
        sync(*staging.iterdir(), staging)
        shutil.rmtree(_addition(bundle.path), ignore_errors=True)
        staging.rename(_addition(bundle.path))  # from here on the files are added, whatever happens
    _finish_adding(bundle.path)
    return replace(bundle, manifest=manifest)


def _addition(path: Path) -> Path:
    """Return the hidden folder beside a bundle whose files are being moved into it."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name[:200]}.adding")


def _finish_adding(path: Path) -> None:
    """Move the files of an addition into the bundle, the manifest last; drop one that does not fit it."""
    folder = _addition(path)
    if folder.is_symlink() or not folder.is_dir():
        return
    try:
        names = list_files(folder) - {MANIFEST}
        fits = all(
            _is_file_of(entry, folder / name)
            or (not (folder / name).exists() and _is_file_of(entry, path / name))
            for name, entry in read_manifest(folder)["files"].items()
        )
        for name in [*sorted(names), MANIFEST] if fits else []:
            with suppress(FileNotFoundError):  # another process moves them, too
                (folder / name).replace(path / name)
        sync(path)
        shutil.rmtree(folder, ignore_errors=True)
    except BundleError:  # of another bundle that stood here, or moved already
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"an interrupted addition of files to {path} cannot be finished: {error}. Make {path} and the "
            f"folder around it writable, or remove {folder}."
        ) from error


def _is_file_of(entry: object, path: Path) -> bool:
    try:
        return describe_file(path) == entry
    except OSError:
        return False


def _publish(staging: Path, out: Path) -> None:
    old = sibling(out, "old")
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except BaseException:  # an interruption, too
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    sync(staging.parent)
    shutil.rmtree(old, ignore_errors=True)
