"""Memory of which the pages around are forbidden and the bytes around are NaN: a kernel's mistakes show."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

_PAGE = mmap.PAGESIZE
_POISON = 0xFF  # two or four of them are a NaN
PLACES = ("begin", "shifted", "end")


class Guarded:
    """A copy of an array between two forbidden pages.

    ``begin``: right behind the first one, so 16-byte aligned; ``shifted``: one element later, so misaligned;
    ``end``: right before the second one.
    """

    def __init__(self, array: np.ndarray, place: str) -> None:
        self._shape, self._dtype = array.shape, array.dtype
        pages = (array.nbytes + array.itemsize + _PAGE - 1) // _PAGE
        self._memory = mmap.mmap(-1, (pages + 2) * _PAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._bytes[:] = _POISON
        inside = pages * _PAGE
        starts = {"begin": 0, "shifted": array.itemsize, "end": inside - array.nbytes}
        self._start = _PAGE + starts[place]
        self._bytes[self._start : self._start + array.nbytes] = array.reshape(-1).view(np.uint8)
        first = self._bytes.ctypes.data
        self._inside = slice(_PAGE, _PAGE + inside)
        for guard in (first, first + _PAGE + inside):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), _PAGE, 0) == 0  # PROT_NONE
        self.pointer = first + self._start

    def read(self) -> np.ndarray:
        """Return the array as it is now, after a look at the bytes around."""
        count = int(np.prod(self._shape)) * self._dtype.itemsize
        around = self._bytes[self._inside].copy()
        begin = self._start - self._inside.start
        inside = around[begin : begin + count].copy()
        around[begin : begin + count] = _POISON
        assert (around == _POISON).all(), "written outside of the tensor"
        return inside.view(self._dtype).reshape(self._shape)
