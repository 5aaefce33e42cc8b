"""Large arrays that rest in unnamed files: arrays as others are, that take no memory at rest.

A page that somebody reads or writes lies in memory until `let_go`; what was written stays in the
file, below TMPDIR, which is gone with the array. A sum, an optimiser's moments or a model that only
the end of a run asks for need no memory meanwhile; the system's file cache holds them as long as
nobody else wants that memory.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medfl.common.errors import StorageError

# Groups of up to so many bytes stay in memory.
IN_MEMORY_BYTES = 64 * 2**20
# Of what rests, so many numbers are worked on before their pages are let go.
WINDOW = 2**20

_ALIGN = 64
# madvise(2); Python's mmap has no name for it.
_POPULATE_WRITE = 23


def zeros(shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> dict[str, NDArray[Any]]:
    """Arrays of zeros of these shapes; at rest where together they are large.

    Raises:
        StorageError: the disk has no room for them.
    """
    width = np.dtype(dtype).itemsize
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = end
        end += -(-width * math.prod(shape) // _ALIGN) * _ALIGN
    if end <= IN_MEMORY_BYTES:
        return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
    whole = np.frombuffer(_mapped(end), np.uint8)
    return {
        name: whole[start : start + width * math.prod(shapes[name])]
        .view(dtype)
        .reshape(shapes[name])
        for name, start in places.items()
    }


def rested(tensors: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """A copy at rest, where together they are large; those that rest already as they are.

    Raises:
        StorageError: the disk has no room for them.
    """
    if all(_map_of(a) is not None for a in tensors.values()):
        return tensors
    found: dict[str, NDArray[Any]] = {}
    for kind in {a.dtype for a in tensors.values()}:
        own = {name: a for name, a in tensors.items() if a.dtype == kind}
        found |= zeros({name: a.shape for name, a in own.items()}, kind)
        for name, array in own.items():
            _copy(array, found[name])
    return {name: found[name] for name in tensors}


def _copy(array: NDArray[Any], target: NDArray[Any]) -> None:
    values, targets = array.reshape(-1), target.reshape(-1)
    for first in range(0, len(values), WINDOW):
        where = slice(first, first + WINDOW)
        targets[where] = values[where]
        let_go(target, first, min(first + WINDOW, len(values)))


def bring(array: NDArray[Any], start: int, stop: int) -> None:
    """Have the memory of entries start..stop ready to be written, if the array rests: one call,
    where a fault a page would take half as long again as the work."""
    pages = _pages(array, start, stop)
    if pages is not None:
        # Before Linux 5.14 the system does not know the request, and faults do it.
        with suppress(OSError):
            pages[0].madvise(_POPULATE_WRITE, *pages[1:])


def let_go(array: NDArray[Any], start: int = 0, stop: int | None = None) -> None:
    """Give up the memory of entries start..stop of the flattened array, if it rests at all."""
    pages = _pages(array, start, array.size if stop is None else stop)
    if pages is not None:
        # Neighbours on the same pages come back from the file when they are used.
        pages[0].madvise(mmap.MADV_DONTNEED, *pages[1:])


def _pages(array: NDArray[Any], start: int, stop: int) -> tuple[mmap.mmap, int, int] | None:
    """Map, first byte and length of the pages that hold the entries; None for other arrays."""
    pages = _map_of(array)
    if pages is None:
        return None
    origin = np.frombuffer(pages, np.uint8).ctypes.data
    begin = array.ctypes.data - origin + array.itemsize * start
    first = begin - begin % mmap.PAGESIZE
    return pages, first, begin + array.itemsize * (stop - start) - first


def _map_of(array: NDArray[Any]) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def _mapped(size: int) -> mmap.mmap:
    try:
        with TemporaryFile() as file:
            # All of it now: a page for which there is no room later would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise StorageError(
            f"What a round of this model needs could not be held on disk ({error.strerror}). Free "
            "some space, or point TMPDIR to a disk with room for six models"
        ) from None
