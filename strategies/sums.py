"""Weighted sums of a round's updates, in float64, at rest where they are large.

In float64 a sum takes twice the memory of the model. At rest (`medfl.common.resting`) it takes
none, so that the coordinator holds the model, one update and a block; the arithmetic is the same,
number by number.
"""

from __future__ import annotations

import numpy as np

from medfl.common import resting
from medfl.common.tensors import Array, Tensors, floats

# So many numbers are added at once: what a core's cache holds as float64.
_BLOCK = 2**15


class Sum:
    """sum_i weight_i * tensors_i, by name, in float64 and in the order of `add`."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add the floating entries. Raises StorageError where the disk refuses."""
        found = floats(tensors)
        new = {name: a.shape for name, a in found.items() if name not in self._sums}
        self._sums |= resting.zeros(new, np.float64)
        for name, array in found.items():
            _add(self._sums[name], array, weight)

    def divided(self, by: float) -> dict[str, Array]:
        """The sums / `by` as float32, at rest where they are large; the sums are given up.

        Raises:
            StorageError: the disk refused.
        """
        means = resting.zeros({name: s.shape for name, s in self._sums.items()}, np.float32)
        for name, mean in means.items():
            _divide(self._sums.pop(name), by, mean)
        return means


def _add(total: Array, array: Array, weight: float) -> None:
    sums, values = total.reshape(-1), array.reshape(-1)
    part = np.empty(min(_BLOCK, len(values)), dtype=np.float64)
    for begin in range(0, len(values), resting.WINDOW):
        end = min(begin + resting.WINDOW, len(values))
        resting.bring(total, begin, end)
        for first in range(begin, end, _BLOCK):
            last = min(first + _BLOCK, end)
            weighted = part[: last - first]
            weighted[...] = values[first:last]
            weighted *= weight
            sums[first:last] += weighted
        resting.let_go(total, begin, end)


def _divide(total: Array, by: float, mean: Array) -> None:
    sums, means = total.reshape(-1), mean.reshape(-1)
    for begin in range(0, len(sums), resting.WINDOW):
        end = min(begin + resting.WINDOW, len(sums))
        resting.bring(mean, begin, end)
        for first in range(begin, end, _BLOCK):
            last = min(first + _BLOCK, end)
            means[first:last] = sums[first:last] / by
        resting.let_go(total, begin, end)
        resting.let_go(mean, begin, end)
