"""Length and direction of each admitted update, for people: quiet poisoning is in proportion.

A direction is told by the cosine between an update and the others' mean direction. That needs every
update beside every other, so a sketch of each stays in memory and not the update: its numbers under
random signs, added up in groups (Charikar, Chen and Farach-Colton 2002, section 3). Inner products
of sketches are those of the updates but for an error of about one over the root of the groups: .02.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfl.common.seeds import derive
from medfl.common.tensors import Tensors, floats, l2_norm

GROUPS = 4096
# Numbers that are multiplied at a time; a multiple of GROUPS.
_ROW = 65536


@dataclass(frozen=True, slots=True)
class Direction:
    """length: L2 norm of the update. cosine: to the mean direction of the round's others.

    None where there is no direction: a single update, one of length 0, others that cancel.
    """

    length: float
    cosine: float | None


class Directions:
    """One round's updates, as they come by.

    key: what the signs follow from. Without it they are drawn afresh: whoever knows them can make
    an update that looks like another one.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._seed = secrets.randbits(63) if key is None else derive(int.from_bytes(key[:7], "big"))
        self._sketches: dict[str, NDArray[np.float64]] = {}
        self._lengths: dict[str, float] = {}

    def note(self, site: str, delta: Tensors) -> None:
        """Remember one site's update."""
        self._sketches[site] = sketch(delta, self._seed)
        self._lengths[site] = l2_norm(delta)

    def found(self) -> dict[str, Direction]:
        """By site. Each of the others counts by its direction: a long one is one voice too."""
        units = {site: made / n for site, made, n in self._measured() if n > 0}
        whole = sum(units.values(), np.zeros(GROUPS))
        return {
            site: Direction(length, _cosine(units[site], whole) if site in units else None)
            for site, length in self._lengths.items()
        }

    def _measured(self) -> Iterator[tuple[str, NDArray[np.float64], float]]:
        for site, made in self._sketches.items():
            yield site, made, float(np.linalg.norm(made))


def sketch(delta: Tensors, seed: int) -> NDArray[np.float64]:
    """(GROUPS,) float64 of an update, the same groups and signs for the same names and shapes."""
    draw = np.random.default_rng(seed)
    sums = np.zeros(_ROW)
    arrays = floats(delta)
    for name in sorted(arrays):
        flat = np.ascontiguousarray(arrays[name]).reshape(-1)
        whole = len(flat) // _ROW
        # One sign a row here and one a place below: a matrix product, and no copy of the update.
        signs = draw.choice((-1.0, 1.0), size=whole + 1).astype(flat.dtype)
        sums += signs[:whole] @ flat[: whole * _ROW].reshape(whole, _ROW)
        rest = flat[whole * _ROW :]
        sums[: len(rest)] += signs[whole] * rest
    sums *= draw.choice((-1.0, 1.0), size=_ROW)
    made: NDArray[np.float64] = sums.reshape(-1, GROUPS).sum(axis=0)
    return made


def _cosine(own: NDArray[np.float64], whole: NDArray[np.float64]) -> float | None:
    others = whole - own
    length = float(np.linalg.norm(others))
    return float(np.clip(own @ others / length, -1.0, 1.0)) if length > 1e-9 else None
