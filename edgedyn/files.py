"""Files that are whole or absent, and JSON that every parser reads. Device side: standard library only.

A file is written under a hidden name beside its final one, synced to the disk, then renamed: a rename is
atomic only inside one file system. Of several files that belong together, the last one marks the set as
complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from edgedyn.errors import UsageError


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        data: bytes, or an object with the buffer protocol.

    Raises:
        UsageError: if the file cannot be written; an existing one is untouched.
    """
    replace_files({path: data})


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together; readers open the last one first.

    All are written under hidden names first. Then the existing last file is deleted, the others are renamed,
    and the new last file is renamed after them. So after an interruption the last file is either absent, or
    present with the others that it was written with.

    Args:
        files: path -> bytes; existing files are replaced.

    Raises:
        UsageError: if a file cannot be written; before the first rename nothing has changed.
    """
    parts = {path: sibling(path, "part") for path in files}
    path = last = list(files)[-1]
    try:
        for path, part in parts.items():
            with part.open("xb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        if len(files) > 1:
            last.unlink(missing_ok=True)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}. Choose another path, or free disk space.") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give an open file to write into; it takes the place of ``path`` where the block raises nothing.

    Raises:
        UsageError: if the file cannot be written; an existing one is untouched.
    """
    part = sibling(path, "part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}. Choose another path, or free disk space.") from error
    finally:
        part.unlink(missing_ok=True)


def sibling(path: Path, suffix: str) -> Path:
    """Return a new hidden name beside ``path``, for an unfinished or an old version of it."""
    full = Path(os.path.abspath(path))
    return full.with_name(f".{full.name}.{suffix}-{secrets.token_hex(4)}")


def sync(*paths: Path) -> None:
    """Wait until files, or the entries of directories, are on the disk."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue  # Windows opens no directory, and its renames need no sync.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(values: object) -> str:
    """Return indented JSON; infinity and NaN, which JSON lacks, become ``"inf"``, ``"-inf"``, ``"nan"``."""
    return json.dumps(_finite(values), indent=1, default=str, allow_nan=False) + "\n"


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return str(values)
    return values


def cached_path(file: str, sources: Iterable[Path], *facts: str) -> Path:
    """Return where the cache keeps a file that is built from sources.

    The folder's name is a digest of the sources, the platform and ``facts``: a change of any of them, for
    instance of a compiler's version, gives another path.
    """
    content = hashlib.sha256(" ".join((platform.platform(), *facts)).encode())
    for path in sources:
        content.update(f"\n{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return cache() / f"{Path(file).stem}-{content.hexdigest()[:16]}" / file


def cache() -> Path:
    """Return the folder of files that are built or fetched once and shared by every checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedyn"
