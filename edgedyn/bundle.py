"""A bundle: one directory with a program, what belongs to it, and a manifest that vouches for every byte.

    manifest.json   canonical JSON (sorted keys, indent 1, newline at the end) with its own sha256 inside
    model.pte ...   every other file is listed with size and sha256, and no other may stand there
    vectors/        the one folder: inputs and expected outputs, ``.npy`` without pickle

Opening fails closed. The digests find damage and mix-ups; they are no signature: who can write the directory
can write a manifest that fits. Device side: standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedyn.errors import BundleError, UsageError
from edgedyn.tensors import TensorSpec

FORMAT = 1
MANIFEST = "manifest.json"
VECTORS = "vectors"
_PLAIN_NAME = re.compile(rf"({VECTORS}/)?[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_MANIFEST_BYTES = 16 * 2**20
# The integers that every JSON reader agrees on (RFC 8259, section 6).
_MAX_NUMBER = 2**53
_NUMBER = (int, float)
_DTYPES = ("float16", "float32")
_MANIFEST_KEYS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    **dict.fromkeys(("name", "edgedyn", "target", "precision", "program"), (str,)),
    **dict.fromkeys(("inputs", "outputs", "vectors"), (list,)),
    **dict.fromkeys(("forms", "tile", "versions", "digests", "facts"), (dict,)),
}
_TENSOR_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "dtype", "meaning"), (str,)),
    "shape": (list,),
    **dict.fromkeys(("low", "high"), _NUMBER),
}
_VECTOR_KEYS: dict[str, tuple[type, ...]] = {"input": (str,), "output": (str,), "max_abs": _NUMBER}


@dataclass(frozen=True)
class Vector:
    """One validation vector: the file of the input, of the expected output, and how far a device may be off.

    Attributes:
        input: name of a ``.npy`` in the bundle, of the first input's shape and dtype.
        output: name of a ``.npy`` in the bundle, of the first output's shape and dtype.
        max_abs: largest difference that is allowed at any element, in units of the output.
    """

    input: str
    output: str
    max_abs: float


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its directory and the parsed manifest, to be treated as read-only.

    Only ``open_bundle``, ``write_bundle`` and ``add_file`` make one.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def target(self) -> str:
        """Name of the target that the program was lowered to."""
        return str(self.manifest["target"])

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``."""
        return str(self.manifest["precision"])

    @property
    def program(self) -> str:
        """Name of the file that the runtime loads."""
        return str(self.manifest["program"])

    @property
    def inputs(self) -> list[TensorSpec]:
        """What the program takes, in order."""
        return _specs(self.manifest["inputs"])

    @property
    def outputs(self) -> list[TensorSpec]:
        """What the program returns, in order."""
        return _specs(self.manifest["outputs"])

    @property
    def overlap(self) -> int:
        """Pixels that neighbouring tiles share at least."""
        return int(self.manifest["tile"]["overlap"])

    @property
    def vectors(self) -> list[Vector]:
        """The validation vectors."""
        return [Vector(**{key: entry[key] for key in _VECTOR_KEYS}) for entry in self.manifest["vectors"]]


def open_bundle(path: Path) -> Bundle:
    """Verify the bundle in the directory ``path``, every byte of it, and open it.

    Raises:
        BundleError: if it is no bundle, or anything in it is not as its manifest says.
    """
    if not path.is_dir():
        raise _refusal(path, "the path", "no directory", "the directory of a bundle", "Check the path.")
    manifest = _read_manifest(path)
    _check_values(path, manifest)
    _check_files(path, manifest["files"])
    return Bundle(path, manifest)


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """Make a hidden empty folder to build a bundle in, and remove what is left of it at the end.

    Beside ``out``, because a rename is atomic only inside one file system. Parents of ``out`` are made.

    Raises:
        UsageError: if the folder cannot be made.
    """
    staging = _sibling(out, "part")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot write beside {out}: {error}. Choose another place.") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(out: Path, *, force: bool = False) -> None:
    """Refuse to write over what is at ``out``: call it before long work; ``write_bundle`` calls it last.

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
        strangers = _listing(out) - {MANIFEST, *_parse(out, _manifest_bytes(out))["files"]}
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
    names = _listing(staging)
    complete = {**manifest, "files": {name: _entry(staging / name) for name in names}}
    _sync(*(staging / name for name in names))
    replace_file(staging / MANIFEST, canonical(_sealed(complete)))
    bundle = open_bundle(staging)
    _sync(*(path for path in (staging / VECTORS, staging) if path.is_dir()))
    refuse_existing(out, force=force)
    _publish(staging, out)
    return replace(bundle, path=out)


def add_file(bundle: Bundle, name: str) -> Bundle:
    """List the file ``name``, which now stands in the bundle, in its manifest, or renew its entry.

    Raises:
        BundleError: if there is no plain file of that name, or the rest of the bundle is not as it was.
    """
    if name not in _listing(bundle.path) - {MANIFEST}:
        raise _refusal(bundle.path, "the file to add", repr(name), "a plain file in it", "Write it first.")
    files = {**bundle.manifest["files"], name: _entry(bundle.path / name)}
    _check_files(bundle.path, files)
    manifest = _sealed({**bundle.manifest, "files": files})
    _sync(bundle.path / name)
    replace_file(bundle.path / MANIFEST, canonical(manifest))
    return replace(bundle, manifest=manifest)


def canonical(manifest: dict[str, Any]) -> bytes:
    """Return the one serialization of a manifest.

    Raises:
        BundleError: if it holds anything but finite numbers, strings, booleans, None, lists and dictionaries.
    """
    try:
        return (json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest is not plain JSON: {error}. Give it plain finite values.") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` at once or not at all: a part file beside it, synced, then a rename.

    Raises:
        UsageError: if the file cannot be written; what was there is untouched.
    """
    part = _sibling(path, "part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}. Choose another place, or make room.") from error
    finally:
        part.unlink(missing_ok=True)


def _refusal(path: Path, what: str, found: str, expected: str, step: str = "Build it again.") -> BundleError:
    return BundleError(f"bundle {path}: {what}: found {found}, expected {expected}. {step}")


def _sibling(path: Path, suffix: str) -> Path:
    full = Path(os.path.abspath(path))
    return full.with_name(f".{full.name}.{suffix}-{secrets.token_hex(4)}")


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    bare = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return {**bare, "manifest_sha256": hashlib.sha256(canonical(bare)).hexdigest()}


def _manifest_bytes(path: Path) -> bytes:
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise _refusal(path, MANIFEST, "no such plain file", "the manifest of a bundle", "Check the path.")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise _refusal(path, MANIFEST, f"{file.stat().st_size} bytes", f"at most {_MAX_MANIFEST_BYTES}")
    return file.read_bytes()


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data, object_pairs_hook=_distinct, parse_int=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, MANIFEST, str(error), "strict JSON in ASCII") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise _refusal(path, MANIFEST, "no object with the key 'files'", "the manifest of a bundle")
    return manifest


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a key twice among {sorted(key for key, _ in pairs)}")
    return values


def _number(text: str) -> int | float:
    if not abs(float(text)) <= _MAX_NUMBER:
        raise ValueError(f"number {text[:24]}, which is not finite or beyond 2**53")
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _specs(entries: list[dict[str, Any]]) -> list[TensorSpec]:
    known = [{key: entry[key] for key in _TENSOR_KEYS} for entry in entries]
    return [TensorSpec(**{**entry, "shape": tuple(entry["shape"])}) for entry in known]


def _read_manifest(path: Path) -> dict[str, Any]:
    data = _manifest_bytes(path)
    manifest = _parse(path, data)
    if manifest.get("format") != FORMAT:
        found = f"{manifest.get('format')!r} (written by edgedyn {manifest.get('edgedyn', 'unknown')})"
        raise _refusal(path, "format", found, str(FORMAT), "Use that edgedyn, or build it again.")
    if data != canonical(manifest):
        raise _refusal(path, MANIFEST, "another serialization", "the canonical one")
    expected = _sealed(manifest)["manifest_sha256"]
    if manifest.get("manifest_sha256") != expected:
        raise _refusal(path, "manifest_sha256", repr(manifest.get("manifest_sha256")), expected)
    return manifest


def _check_types(path: Path, what: str, values: Any, kinds: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(values, dict):
        raise _refusal(path, what, repr(values), f"an object of {sorted(kinds)}")
    for key, allowed in kinds.items():
        if type(values.get(key)) not in allowed:
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise _refusal(path, f"{what}, key {key!r}", repr(values.get(key, "nothing")), expected)


def _check_values(path: Path, manifest: dict[str, Any]) -> None:
    _check_types(path, "manifest", manifest, _MANIFEST_KEYS)
    _check_types(path, "tile", manifest["tile"], {"overlap": (int,)})
    rules = [
        ("tile.overlap", manifest["tile"]["overlap"], "from 0", manifest["tile"]["overlap"] >= 0),
        ("program", manifest["program"], "a plain name", bool(_PLAIN_NAME.fullmatch(manifest["program"]))),
        ("inputs", manifest["inputs"], "at least one", bool(manifest["inputs"])),
        ("outputs", manifest["outputs"], "at least one", bool(manifest["outputs"])),
    ]
    for tensor in manifest["inputs"] + manifest["outputs"]:
        _check_types(path, "a tensor", tensor, _TENSOR_KEYS)
        sized = all(type(size) is int and 0 < size < 2**31 for size in tensor["shape"])
        rules.append(("shape", tensor["shape"], "sizes from 1", sized))
        rules.append(("dtype", tensor["dtype"], f"one of {_DTYPES}", tensor["dtype"] in _DTYPES))
    for vector in manifest["vectors"]:
        _check_types(path, "a vector", vector, _VECTOR_KEYS)
        listed = {vector["input"], vector["output"]} <= set(manifest["files"])
        rules.append(("a vector", vector, "listed files, max_abs from 0", listed and vector["max_abs"] >= 0))
    for what, found, expected, holds in rules:
        if not holds:
            raise _refusal(path, what, repr(found), expected)


def _listing(path: Path) -> set[str]:
    names = set()
    for entry in [*path.iterdir(), *(path / VECTORS).glob("*")]:
        name = entry.relative_to(path).as_posix()
        kind = entry.lstat().st_mode
        if name == VECTORS and stat.S_ISDIR(kind):
            continue
        if not stat.S_ISREG(kind) or not _PLAIN_NAME.fullmatch(name):
            raise _refusal(path, f"entry {name!r}", "a link, folder or odd name", "plain files", "Remove it.")
        names.add(name)
    return names


def _check_files(path: Path, files: dict[str, Any]) -> None:
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise _refusal(path, "a listed name", repr(name), f"letters, digits, . _ - and only {VECTORS}/")
    taken = [name.lower() for name in (MANIFEST, VECTORS, *files)]
    if len(set(taken)) != len(taken):
        raise _refusal(path, "listed names", str(sorted(files)), f"distinct ones in any case, no {MANIFEST}")
    here = _listing(path) - {MANIFEST}
    if missing := sorted(set(files) - here):
        raise _refusal(path, "listed files", f"no {', '.join(missing)}", "every listed file")
    if extra := sorted(here - set(files)):
        raise _refusal(path, "other files", ", ".join(extra), f"only those in {MANIFEST}", "Remove them.")
    for name, entry in files.items():
        found = _entry(path / name)
        if found != entry:
            raise _refusal(path, f"file {name}", str(found), str(entry))


def _entry(path: Path) -> dict[str, Any]:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}


def _sync(*paths: Path) -> None:
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue  # Windows opens no directory, and its renames need no sync of one.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(staging: Path, out: Path) -> None:
    old = _sibling(out, "old")
    if out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync(staging.parent)
    shutil.rmtree(old, ignore_errors=True)
