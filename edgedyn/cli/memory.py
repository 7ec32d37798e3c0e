"""Freed memory stays with the process: each node allocates and frees feature maps of tens of megabytes.

By default glibc returns blocks of that size to the system at once, and gets them back page by page, each
filled with zeros: calibrating mallenet-s spent a third of its processor time there
(docs/measurements/calibration-time.json).
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MAP = 2**30  # bytes; larger blocks are rare and may go back to the system


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next tensor; return whether its C library can.

    The peak of that calibration grows from 917 to 1068 MiB. Only programs may call this: a library leaves the
    choice to its user.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAP))
