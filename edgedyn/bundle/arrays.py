"""Arrays of a bundle: ``.npy`` files whose header is compared as text, never evaluated. Needs numpy only."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from edgedyn.bundle.tensors import TensorSpec
from edgedyn.errors import BundleError

_MAGIC = b"\x93NUMPY\x01\x00"  # format 1.0, then two bytes of the header's length
_HEADER = re.compile(
    rb"\{'descr': '<(f[24])', 'fortran_order': (True|False), 'shape': \(([0-9, ]{1,100})\), \} *\n"
)


def read_array(folder: Path, name: str, spec: TensorSpec) -> np.ndarray:
    """Read an array of the dtype and shape that a bundle's manifest gives.

    Args:
        folder: of the bundle.
        name: of the file in it.
        spec: the tensor that it is a value of.

    Raises:
        BundleError: if the file is no such ``.npy``, or has another dtype, shape or length.
    """
    expected = f"{spec.dtype} {tuple(spec.shape)}"
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _refusal(folder, name, str(error), expected, spec) from error
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(data[start - 2 : start], "little")
    header = _HEADER.fullmatch(data[start:end])
    if not data.startswith(_MAGIC) or header is None:
        found = f"no header of an array of floats: {data[:start]!r}{data[start : start + 60]!r}"
        raise _refusal(folder, name, found, expected, spec)
    dtype = np.dtype(f"<{header[1].decode()}")
    shape = tuple(int(size) for size in header[3].decode().replace(" ", "").split(",") if size)
    if f"{dtype} {shape}" != expected:
        raise _refusal(folder, name, f"{dtype} {shape}", expected, spec)
    length = dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) - end != length:
        found = f"{len(data) - end} bytes of values, not {length}"
        raise _refusal(folder, name, found, expected, spec)
    array = np.frombuffer(data, dtype, offset=end)
    return array.reshape(shape, order="F" if header[2] == b"True" else "C")


def _refusal(folder: Path, name: str, found: str, expected: str, spec: TensorSpec) -> BundleError:
    return BundleError(
        f"bundle {folder}, {name}: found {found}, expected .npy without pickle, {expected} of {spec.name!r}. "
        "Build the bundle again."
    )
