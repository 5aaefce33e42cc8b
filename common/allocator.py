"""How a process that passes large messages on gives their memory back."""

from __future__ import annotations

import ctypes

# mallopt(3), malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def give_back() -> None:
    """Let glibc return blocks above 1 MiB to the system as soon as they are free.

    By itself it raises that limit to 32 MiB after the first large block, and then keeps objects of
    5 MiB in as many heaps as there are threads. Elsewhere than on glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 2**20), (_TRIM_THRESHOLD, 2**20), (_ARENA_MAX, 4)):
            mallopt(option, value)
