"""Files of strangers: only regular ones of a limited size, as UTF-8 text or as strict JSON.

Every parser reads strict JSON alike. Device side: standard library only.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from edgedyn.errors import shown

MAX_TEXT_BYTES = 64 * 2**20
MAX_FILE_BYTES = 4 * 2**30  # of an image
_MAX_NUMBER = 2**53  # the integers that every JSON reader agrees on (RFC 8259, section 6)


class TextError(ValueError):
    """A text does not follow its format; the message names the line where it is known."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a device, a pipe or a folder is refused and never waited for.

    Raises:
        OSError: with a reason in ``strerror``.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115, the caller closes it
    except ValueError as error:  # a NUL, or a character that the file system cannot encode
        raise OSError(errno.EINVAL, f"not a file name: {error}", str(path)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was replaced since
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither this flag nor pipes


def read_bytes(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file of at most ``most`` bytes.

    Raises:
        OSError: with a reason in ``strerror``, also for a larger file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > most else file.read(min(most, size + 2**16) + 1)
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"{max(size, len(data))} bytes; expected at most {most}", str(path))
    return data


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a regular UTF-8 file, without a byte order mark.

    Raises:
        OSError: as ``read_bytes``.
        TextError: when it is not UTF-8.
    """
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(
            f"line {line}: the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


def parse_json(text: str | bytes) -> Any:
    """Return the values of a strict JSON text: no key twice, finite numbers, integers up to 2**53.

    Raises:
        TextError: for any other text.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_fraction,
            parse_constant=_constant,
        )
    except TextError:
        raise
    except RecursionError as error:
        raise TextError("its lists and objects are nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise TextError(str(error)) from error


def read_json(path: Path, most: int = MAX_TEXT_BYTES) -> Any:
    """Return the values of a file of strict JSON.

    Raises:
        OSError: as ``read_bytes``.
        TextError: as ``parse_json``.
    """
    return parse_json(read_text(path, most))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise TextError(f"a key twice in one object, {shown(key)}")
        values[key] = value
    return values


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > _MAX_NUMBER:
        raise TextError(f"number {shown(text, 24)}, which is beyond 2**53")
    return int(text)


def _fraction(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise TextError(f"number {shown(text, 24)}, which is not finite")
    return value


def _constant(text: str) -> float:
    raise TextError(f"the value {text} is not a number; this is not plain JSON")
