"""Files that are whole or absent, and JSON that every parser reads. Device side: standard library only.

A file is written under a hidden name beside its final one, synced to the disk, then renamed: a rename is
atomic only inside one file system. Of several files that belong together, the last one marks the set as
complete. The writer holds a lock on the hidden name; without its writer, the next run removes it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from edgedyn.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind: remains are not removed there
    fcntl = None  # type: ignore[assignment]

_NAME = 50  # characters of a name that its hidden versions repeat; the longest names leave no room for more
_WRITING = {
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG")
} | {None}  # of numpy.ndarray.tofile, too, which gives no number


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
    path = last = list(files)[-1]
    with ExitStack() as stack:
        try:
            parts = {}
            for path, data in files.items():
                parts[path] = stack.enter_context(_locked_part(path, is_folder=False))
                with parts[path].open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            if len(files) > 1:
                last.unlink(missing_ok=True)
            for path, part in parts.items():
                part.replace(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise cannot_write(path, error) from error


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """Make a hidden empty folder to build ``out`` in, and remove its remains at the end.

    Beside ``out``, because a rename is atomic only inside one file system. Parents of ``out`` are made.
    Remains of a process that was killed are removed first.

    Raises:
        UsageError: if the folder cannot be made, or for an OSError inside of it, such as a full disk.
    """
    with ExitStack() as stack:
        try:
            Path(os.path.abspath(out)).parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(_locked_part(out, is_folder=True))
        except (OSError, ValueError) as error:
            raise cannot_write(out, error) from error
        try:
            yield staging
        except OSError as error:
            if error.errno not in _WRITING:
                raise
            raise cannot_write(out, error) from error


def refuse_unwritable(out: Path, *, is_folder: bool = False) -> None:
    """Refuse an output that cannot be written, before long work; nothing is left.

    It writes a small file beside ``out``, or into a folder beside it, and makes missing parents for as long.

    Raises:
        UsageError: for a read-only or full disk, closed permissions, a name that is too long, a file in the
            place of a parent folder.
    """
    try:
        full = Path(os.path.abspath(out))
        made = [parent for parent in (full.parent, *full.parent.parents) if not os.path.lexists(parent)]
        try:
            full.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                os.lstat(full)  # refuses a name that is too long, which the hidden name is not
            if full.is_dir() and not is_folder:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if full.is_dir() and not os.access(full, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with _locked_part(full, is_folder=is_folder) as part:
                file = part / ("probe" * 12) if is_folder else part
                file.write_bytes(bytes(2**16))
                sync(file)
        finally:
            for parent in made:
                with suppress(OSError):  # it was not made, or another process uses it by now
                    parent.rmdir()
    except (OSError, ValueError) as error:
        raise cannot_write(out, error) from error


def make_folder(path: Path) -> None:
    """Make a folder with its parents, where it does not exist.

    Raises:
        UsageError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> UsageError:
    """Return the refusal for an output, by the error of the system."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(f"cannot write {path}: {reason}. {_next_step(error)}")


def _next_step(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free disk space, or choose a place on another disk."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a folder that you may write to."
    if number == errno.ENAMETOOLONG:
        return "Choose a shorter name."
    return "Choose another place."


@contextmanager
def _locked_part(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Make a hidden file or folder beside ``path``, locked for this process, and remove it at the end.

    Raises:
        OSError: if it cannot be made.
    """
    remove_remains(path)
    while True:
        part = sibling(path, "part")
        descriptor = -1
        try:
            if is_folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
            if fcntl is not None:
                descriptor = os.open(part, os.O_RDONLY)
                with suppress(OSError):  # a file system without locks: its remains stay
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if part.exists():  # another run has not taken it for remains, before it was locked
                yield part
                return
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            _remove(part)


def remove_remains(path: Path) -> None:
    """Remove hidden files and folders of writers of ``path`` that were killed; their locks are free.

    An old version of it is kept while ``path`` itself is missing.
    """
    full = Path(os.path.abspath(path))
    kinds = "(part|old)" if full.exists() else "part"
    named = re.compile(re.escape(f".{full.name[:_NAME]}.") + kinds + "-[0-9a-f]{8}")
    if fcntl is None or not full.parent.is_dir():
        return
    for name in filter(named.fullmatch, os.listdir(full.parent)):
        part = full.parent / name
        with suppress(OSError):  # its writer lives, or it is not ours to remove
            descriptor = os.open(part, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(part)
            finally:
                os.close(descriptor)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give an open file to write into; it takes the place of ``path`` where the block raises nothing.

    Raises:
        UsageError: if the file cannot be written; an existing one is untouched.
    """
    try:
        with _locked_part(path, is_folder=False) as part:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def sibling(path: Path, suffix: str) -> Path:
    """Return a new hidden name beside ``path``, for an unfinished or an old version of it."""
    full = Path(os.path.abspath(path))
    return full.with_name(f".{full.name[:_NAME]}.{suffix}-{secrets.token_hex(4)}")


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
