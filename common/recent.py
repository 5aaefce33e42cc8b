"""What was made of an object, for as long as the next question is about the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """`make`, called once for an object that is asked about many times in a row.

    Objects are told apart by identity: what is asked of all sites has arrays that nobody compares.
    """

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._kept: tuple[K, V] | None = None

    def __call__(self, of: K) -> V:
        """What `make` makes of it; what was made of another object is let go of first."""
        if self._kept is None or self._kept[0] is not of:
            self._kept = None
            self._kept = of, self._make(of)
        return self._kept[1]
