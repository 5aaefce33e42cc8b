"""Denials in the audit log: whoever asks a thousand times fills a few lines and not a thousand.

The first ten of a kind have a line each, then the hundredth, the thousandth and so on, each with
how many it stands for; so the log of an attack grows with the logarithm of its length.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

# Kinds that are told apart; a peer that invents more of them is counted under one.
_KINDS = 1000
_EACH = 10


@dataclass(slots=True)
class Denials:
    """Counts of this process. A process that ends takes with it what no line has told yet."""

    _counts: dict[tuple[str, ...], int] = field(default_factory=dict)
    _told: dict[tuple[str, ...], int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def times(self, *kind: str) -> int:
        """Count one denial; how many the line stands for that is to be written now, 0 for none.

        kind: what it is about. Numbers in it are not looked at: they are the peer's to choose.
        """
        key = tuple(re.sub(r"\d+", "#", part)[:80] for part in kind)
        with self._lock:
            if key not in self._counts and len(self._counts) >= _KINDS:
                key = ("other",)
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if count > _EACH and not _is_power_of_ten(count):
                return 0
            new = count - self._told.get(key, 0)
            self._told[key] = count
            return new


def _is_power_of_ten(n: int) -> bool:
    return str(n).strip("0") == "1"
