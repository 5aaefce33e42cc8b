"""How a process that passes large messages on gives their memory back."""

from __future__ import annotations

import ctypes

# mallopt(3), malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LIMITS = {_MMAP_THRESHOLD: 6 * 2**20, _TRIM_THRESHOLD: 16 * 2**20, _ARENA_MAX: 2}


def give_back() -> None:
    """Let glibc return large blocks to the system as soon as they are free, and few heaps.

    By itself it raises the limit of large to 32 MiB after the first such block, and keeps what is
    smaller in as many heaps as there are threads. Flower's objects of 5 MiB stay below the limit:
    to fetch and clear 1,280 new pages for each took half of the gateway's time in the system, and
    the two heaps keep 16 MiB each. Elsewhere than on glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _LIMITS.items():
            mallopt(option, value)
