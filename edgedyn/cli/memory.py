"""How the C library keeps memory: feature maps are tens of megabytes, made and dropped once a node.

glibc gives as much back to the system at once, and gets it back page by page, each filled with zeros:
calibrating mallenet-s spent a third of its processor time there (docs/measurements/calibration-time.json).
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MAP = 2**30  # bytes; what is larger is rare enough to be asked for


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next tensor; return whether its C library is one that can.

    The peak grows a little, 917 to 1068 MiB there. For programs: a library leaves the choice to its user.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAP))
