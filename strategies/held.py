"""A round's updates held as the rows of one matrix, for rules that must see them side by side.

The rows lie in an unnamed temporary file (in memory while they are small), and are read back some
columns at a time: the coordinator's memory does not grow with the number of hospitals, its disk
does (sites x model, below TMPDIR, gone when the round is combined).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import FederationError, StorageError
from medfl.common.messages import Reply
from medfl.common.tensors import Array, Tensors, floats, l2_norm

Matrix = NDArray[np.float64]

# Rows stay in memory up to this many bytes.
IN_MEMORY_BYTES = 64 * 2**20
# So many bytes of columns are read at once: what a core's cache holds.
BLOCK_BYTES = 2 * 2**20


@dataclass(slots=True)
class Held:
    """Updates as rows of float32, all with the same parameters.

    shapes: of the parameters, in their order within a row. n_cases, norms: one number a row.
    """

    _file: SpooledTemporaryFile[bytes]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    n_cases: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.n_cases)

    @property
    def width(self) -> int:
        """Entries of one row."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def append(self, update: Reply) -> None:
        """Add one row. Raises FederationError where its parameters are not those of the others."""
        delta = floats(update.delta)
        shapes = {name: a.shape for name, a in delta.items()}
        if not self.n_cases:
            self.shapes = shapes
        elif shapes != self.shapes:
            raise FederationError(
                "Updates of one round have different parameters and cannot be compared. Admission "
                "should have left one of them out; please report this."
            )
        if self._file.tell() + 4 * self.width > IN_MEMORY_BYTES:
            self._file.rollover()  # by itself it would do so after the row lies in memory
        for name in self.shapes:
            self._file.write(np.ascontiguousarray(delta[name], dtype=np.float32).data)
        self.n_cases.append(update.n_cases)
        self.norms.append(l2_norm(delta))

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Some columns at a time: where they lie, and the (sites, columns) block."""
        width, sites = self.width, len(self)
        step = max(1, BLOCK_BYTES // (4 * max(1, sites)))
        for start in range(0, width, step):
            stop = min(start + step, width)
            block = np.empty((sites, stop - start), dtype=np.float32)
            for row in range(sites):
                self._file.seek(4 * (row * width + start))
                self._file.readinto(block[row].data)
            yield slice(start, stop), block

    def row(self, number: int) -> dict[str, Array]:
        """One update again, as named arrays of float32."""
        values = np.empty(self.width, dtype=np.float32)
        self._file.seek(4 * number * self.width)
        self._file.readinto(values.data)
        return self.as_tensors(values)

    def as_tensors(self, row: NDArray[np.float32]) -> dict[str, Array]:
        """One row as named arrays again."""
        named, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            named[name] = row[start:stop].reshape(shape)
            start = stop
        return named

    def weighted_sum(self, factors: Sequence[float] | Matrix) -> Tensors:
        """sum_i factors[i] * row i, added up in float64 and in the order of the rows."""
        total = np.empty(self.width, dtype=np.float32)
        for where, block in self.blocks():
            part = np.zeros(block.shape[1], dtype=np.float64)
            for factor, row in zip(factors, block, strict=True):
                if factor:  # 0 * inf is no number, and a row that is not wanted costs nothing
                    part += float(factor) * row
            total[where] = part
        return self.as_tensors(total)

    def squared_distances(self) -> Matrix:
        """(sites, sites): ||row i - row j||^2, through inner products block by block."""
        inner = np.zeros((len(self), len(self)), dtype=np.float64)
        for _, block in self.blocks():
            wide = block.astype(np.float64)
            inner += wide @ wide.T
        squares = np.diagonal(inner)
        distances = np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0.0)
        np.fill_diagonal(distances, 0.0)
        return np.asarray(distances)


@contextmanager
def hold(updates: Iterable[Reply]) -> Iterator[Held]:
    """All updates of a round, held until the block ends.

    Raises:
        StorageError: the disk refused.
    """
    with SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as file:
        held = Held(file)
        _fill(held, updates)
        yield held


def _fill(held: Held, updates: Iterable[Reply]) -> None:
    for update in updates:
        try:
            held.append(update)
        except OSError as error:
            raise StorageError(
                f"The updates of a round could not be held on disk ({error.strerror}). Free "
                "some space, or point TMPDIR to a disk that has room for all of them"
            ) from None
        del update  # else it would lie in memory until the next one is there
