"""How a slice of a volume is shown: the same way on every page of medfl."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def upright(slice_: NDArray[Any], orientation: str | None) -> NDArray[Any]:
    """(first axis, second axis) of a volume -> (rows, columns), the patient's right on the left.

    Rows run from the front (or head), columns from the patient's right; letters name where an
    axis leads to, as nibabel's do. Anything that is no slice stays as it is.
    """
    if orientation is None or slice_.ndim != 2:
        return slice_
    away = "RAS"  # axes that lead there start at the picture's other end
    first, second = (-1 if letter in away else 1 for letter in orientation[:2])
    return slice_[::first, ::second].T
