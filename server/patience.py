"""How long the coordinator waits for an answer: what the sites' own past answers say, and no more
than a person allowed.

The first answer to each kind of question may take all of the allowed time. After that a site has
three times the longest of its last five; one that was late once gets twice that, and if it is late
again it has what the others have. A site without a connection is waited for no longer than the
others work, but long enough to come back after a restart or a broken line (`AWAY_S`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_TIMES = 3.0
_REMEMBERED = 5
# A machine that starts anew, or a line that comes back, takes this long whatever the work takes.
AWAY_S = 90.0
_AT_LEAST_S = 120.0


@dataclass(slots=True)
class Patience:
    """Of one run. longest_s: what a person allowed for one answer."""

    longest_s: float
    _took: dict[tuple[str, str], deque[float]] = field(default_factory=dict)
    _late: dict[tuple[str, str], int] = field(default_factory=dict)

    def allows_s(self, site: str, kind: str) -> float:
        """Seconds that this site has for this kind of question."""
        late = self._late.get((site, kind), 0)
        own = self._took.get((site, kind))
        known = own if own and late < 2 else self._of_all(kind)
        if not known:
            return self.longest_s
        times = 2 * _TIMES if late == 1 else _TIMES
        return min(self.longest_s, max(_AT_LEAST_S, times * max(known)))

    def answered(self, site: str, kind: str, seconds: float) -> None:
        """The site answered after so long."""
        self._took.setdefault((site, kind), deque(maxlen=_REMEMBERED)).append(seconds)
        self._late.pop((site, kind), None)

    def missed(self, site: str, kind: str) -> None:
        """The site did not answer in its time."""
        self._late[site, kind] = self._late.get((site, kind), 0) + 1

    def _of_all(self, kind: str) -> list[float]:
        return [s for (_, asked), took in self._took.items() if asked == kind for s in took]
