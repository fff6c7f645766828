"""Memory that is given back. Left to itself, glibc keeps buffers of some megabytes for a next time, in an arena for each thread,
and a process stays as large as its busiest moment: up to twice what it needs.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# What is as large as this is mapped on its own.
LARGE_BYTES = 256 * 1024


def give_back(arenas: int) -> None:
    """Have large buffers mapped and unmapped, and few arenas for the small ones; nothing where the C library is not glibc.

    Args:
        arenas: How many.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, LARGE_BYTES)
        mallopt(_M_ARENA_MAX, arenas)
