"""The folder of files that are built or fetched once and shared by every checkout. Standard library only.

    <cache>/edgedyn/                      this user's alone, mode 700
      <name>-<digest of the sources>/
        <file>                            built in a hidden folder beside it, synced, renamed
        <file>.sha256                     its digest, written last

A library is loaded only if its digest is right: loading a truncated one ends the process with SIGBUS. The
digest finds damage; owner and mode of the folder keep other users out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from edgedyn.errors import UsageError
from edgedyn.files import replace_file, sync

_BUILD = "build-"


def cache() -> Path:
    """Return the folder of the cache, which may not exist yet; XDG_CACHE_HOME counts where it is absolute.

    Raises:
        UsageError: where neither XDG_CACHE_HOME nor a home folder is known.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "edgedyn"
    except RuntimeError as error:
        raise UsageError("there is no home folder for a cache. Set XDG_CACHE_HOME to a folder.") from error


def cached_path(file: str, sources: Iterable[Path], *facts: str) -> Path:
    """Return where the cache keeps a file that is built from sources.

    The folder's name is a digest of the sources, the platform and ``facts``: a change of any of them, for
    instance of a compiler's version, gives another path.
    """
    content = hashlib.sha256(" ".join((platform.platform(), *facts)).encode())
    for path in sources:
        content.update(f"\n{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return cache() / f"{Path(file).stem}-{content.hexdigest()[:16]}" / file


def private_folder(path: Path) -> Path:
    """Return a folder of the cache, made where there is none, that no other user can write to or read.

    Raises:
        UsageError: where it cannot be made, is a link, or belongs to another user.
    """
    for folder in (cache(), path):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            user = os.getuid() if hasattr(os, "getuid") else status.st_uid  # Windows has none
            if folder.is_symlink() or status.st_uid != user:
                kind = "a link" if folder.is_symlink() else f"a folder of user {status.st_uid}"
                raise UsageError(
                    f"the cache {folder} is {kind}; expected a folder of user {user}, because libraries are "
                    "loaded from it. Remove it, or set XDG_CACHE_HOME to a folder of yours."
                )
            if status.st_mode & 0o077:
                folder.chmod(0o700)
        except OSError as error:
            raise UsageError(
                f"the cache {folder} cannot be used: {error}. Set XDG_CACHE_HOME to a folder of yours."
            ) from error
    return path


def build_cached(path: Path, make: Callable[[Path], Path]) -> Path:
    """Return the path of a built file of the cache; build it where it is missing or damaged.

    Args:
        path: from ``cached_path``.
        make: ``make(folder)`` builds the file in an empty folder and returns its path there.

    Raises:
        UsageError: as ``private_folder``.
        EdgedynError: as ``make``.
    """
    private_folder(path.parent)
    digest = path.with_name(f"{path.name}.sha256")
    if _is_whole(path, digest):
        return path
    _sweep()
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"{_BUILD}{os.getpid()}-") as folder:
        built = make(Path(folder))
        built.chmod(0o700)
        sync(built)
        digest.unlink(missing_ok=True)
        text = _sha256(built)
        built.replace(path)  # atomic: another process may build the same file
        replace_file(digest, text.encode())
    sync(path.parent)
    return path


def _is_whole(path: Path, digest: Path) -> bool:
    try:
        return not path.is_symlink() and digest.read_text(encoding="ascii") == _sha256(path)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sweep() -> None:
    """Remove the folders of builds whose process was killed."""
    for folder in cache().glob(f"{_BUILD}*-*") if os.name == "posix" else ():
        try:
            os.kill(int(folder.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            pass  # no folder of ours, or a process that runs
