"""Weighted sums of a round's updates: in memory while they are small, else in a temporary file.

In float64 a sum takes twice the memory of the model. In an unnamed file (below TMPDIR, gone with
the round) it takes none, so that the coordinator holds the model, one update and a block; the
arithmetic is the same, number by number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from tempfile import TemporaryFile

import numpy as np

from medfl.common.errors import StorageError
from medfl.common.tensors import Array, Tensors, floats

# A sum of up to so many bytes stays in memory.
IN_MEMORY_BYTES = 64 * 2**20
# So many numbers are added at once: what a core's cache holds as float64.
_BLOCK = 2**17


class Sum:
    """sum_i weight_i * tensors_i, by name, in float64 and in the order of `add`."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._size = 0
        self._file: int | None = None

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add the floating entries. Raises StorageError where the disk refuses."""
        for name, array in floats(tensors).items():
            if name not in self._arrays and name not in self._places:
                self._begin(name, array.shape)
            if name in self._arrays:
                self._arrays[name] += weight * array.astype(np.float64)
            else:
                self._add_in_file(self._places[name][0], array, weight)

    def divided(self, by: float) -> dict[str, Array]:
        """The sums / `by` as float32; the sums themselves are given up."""
        means = {name: (s / by).astype(np.float32) for name, s in self._arrays.items()}
        for name, (start, shape) in self._places.items():
            mean = np.empty(math.prod(shape), dtype=np.float32)
            for where, block in self._blocks(start, len(mean)):
                mean[where] = np.divide(block, by, out=block)
            means[name] = mean.reshape(shape)
        if self._file is not None:
            os.close(self._file)
        self._arrays, self._places, self._file = {}, {}, None
        return means

    def _begin(self, name: str, shape: tuple[int, ...]) -> None:
        size = 8 * math.prod(shape)
        self._size += size
        if self._size <= IN_MEMORY_BYTES:
            self._arrays[name] = np.zeros(shape, dtype=np.float64)
            return
        try:
            if self._file is None:
                with TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
            start = os.fstat(self._file).st_size
            os.ftruncate(self._file, start + size)  # reads as zeros
        except OSError as error:
            raise _no_room(error) from None
        self._places[name] = start, shape

    def _add_in_file(self, start: int, array: Array, weight: float) -> None:
        flat = array.reshape(-1)
        part = np.empty(min(_BLOCK, len(flat)), dtype=np.float64)
        for where, block in self._blocks(start, len(flat)):
            weighted = part[: len(block)]
            weighted[...] = flat[where]
            weighted *= weight
            block += weighted
            try:
                os.pwrite(self._descriptor, block.data, start + 8 * where.start)
            except OSError as error:
                raise _no_room(error) from None

    def _blocks(self, start: int, length: int) -> Iterator[tuple[slice, Array]]:
        """Each part of a sum in the same memory: fresh memory would cost more than the sum."""
        whole = np.empty(min(_BLOCK, length), dtype=np.float64)
        for first in range(0, length, _BLOCK):
            where = slice(first, min(first + _BLOCK, length))
            block = whole[: where.stop - first]
            if os.preadv(self._descriptor, [block.data], start + 8 * first) != block.nbytes:
                raise StorageError("The file of a sum is shorter than the sum; run it again.")
            yield where, block

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise RuntimeError("a sum that lies in memory has no file")
        return self._file

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._descriptor)


def _no_room(error: OSError) -> StorageError:
    return StorageError(
        f"The sum of a round's updates could not be held on disk ({error.strerror}). Free some "
        "space, or point TMPDIR to a disk with room for two models"
    )
