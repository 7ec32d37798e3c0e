"""Read a ``torch.save`` file by PyTorch's restricted unpickler: tensors, containers, numbers; never code."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedyn.errors import WeightsError

_SLACK = 2**20  # bytes by which a whole archive's contents may exceed the file
_CLASS = re.compile(r"(?:GLOBAL|global) ['\"]?([\w.]+)['\"]? was not")
# data that trainers store beside weights: their making runs no code. NumPy's, under its old and new names
_NUMPY = [
    (getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")  # type: ignore[attr-defined]
    for name in ("scalar", "_reconstruct")
    for core in ("core", "_core")
]
_DATA = [
    *(argparse.Namespace, np.ndarray, np.dtype),
    *(pathlib.PosixPath, pathlib.PurePosixPath, datetime.datetime, datetime.date, datetime.timedelta),
]
_SAVE = "Save the weights alone where the network was trained: torch.save(model.state_dict(), 'weights.pth')."


def read_pickle(path: Path) -> Any:
    """Return the contents of a ``torch.save`` file.

    Raises:
        WeightsError: when it is damaged, TorchScript, of an old format, or holds objects of any class beside
            tensors, containers and numbers; nothing of these is executed.
    """
    _refuse_formats(path)
    allowed: list[Any] = [*_DATA, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"), *_NUMPY]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen unrelated types for a damaged file
        found = _CLASS.search(str(error))
        reason = f"they are damaged, or hold more than tensors ({type(error).__name__})"
        if found and found[1].startswith(("torch.nn.", "torch.fx.")):
            reason = f"they are a pickled module ({found[1][:100]}), which is code, not weights"
        elif found:
            reason = (
                f"they hold an object of another class than tensors, containers and numbers, {found[1][:100]}"
            )
        raise WeightsError(f"weights {path} cannot be loaded as tensors only: {reason}. {_SAVE}") from error


def _refuse_formats(path: Path) -> None:
    try:
        is_archive, entries = zipfile.is_zipfile(path), []
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise WeightsError(
            f"weights {path} cannot be loaded as tensors only: the archive is damaged. Fetch them again."
        ) from error
    if is_archive:
        names = {entry.filename.partition("/")[2] for entry in entries}
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            raise WeightsError(f"weights {path} are a TorchScript program, which is code. {_SAVE}")
        size, held = path.stat().st_size, sum(entry.file_size for entry in entries)
        if held > size + _SLACK:
            raise WeightsError(
                f"weights {path} have {size} bytes and unpack to {held}; expected tensors as torch.save "
                f"writes them, not compressed. {_SAVE}"
            )
    elif tarfile.is_tarfile(path):
        raise WeightsError(f"weights {path} are in the tar format of PyTorch before 0.1.10. {_SAVE}")
