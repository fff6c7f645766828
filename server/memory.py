"""Memory that is given back. A coordinator moves buffers of some megabytes through hundreds of threads; left to itself, glibc
keeps them in an arena for each, and the process stays as large as its busiest moment.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES, _ARENAS = 256 * 1024, 4


def give_back() -> None:
    """Have large buffers mapped and unmapped, and few arenas for the small ones; nothing where the C library is not glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)
