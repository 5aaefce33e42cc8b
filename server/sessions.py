"""Which process of each hospital is live: one rule for the calls and for the tunnel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from medfl.common.coordination import LEASE_S
from medfl.common.errors import PolicyRefused

_NOBODY = ("", float("-inf"))


@dataclass(slots=True)
class Sessions:
    """One live process a site; another waits until it is silent. clock: monotonic seconds."""

    clock: Callable[[], float] = time.monotonic
    _live: dict[str, tuple[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, site: str, session: str) -> None:
        """Raises PolicyRefused while another session of the site is live."""
        with self._lock:
            wait = self._wait_s(site, session)
            if wait > 0:
                raise PolicyRefused(
                    f"Another medfl-client of {site} is running with the same keys. If it was "
                    f"stopped just now, try again in {wait:.0f} s; if it is not yours, tell the "
                    "coordinator at once."
                )
            self._live[site] = (session, self.clock())

    def touch(self, site: str, session: str) -> None:
        """Note that the session is heard. Raises PolicyRefused where it is not the live one."""
        with self._lock:
            if self._live.get(site, _NOBODY)[0] != session or not session:
                raise PolicyRefused(f"This session of {site} is not live; begin with Hello.")
            self._live[site] = (session, self.clock())

    def holds(self, site: str, session: str, *, arriving: bool) -> bool:
        """Whether this process may use the tunnel; then it is heard.

        Who arrives takes a place that is free. Others go on with their own, or with one that
        nobody has had since the coordinator started.
        """
        with self._lock:
            known = self._live.get(site, _NOBODY)[0]
            free = not known or (arriving and self._wait_s(site, session) <= 0)
            if known != session and not free:
                return False
            self._live[site] = (session, self.clock())
            return True

    def end(self, site: str, session: str) -> None:
        """Free the place; another's session stays."""
        with self._lock:
            if self._live.get(site, _NOBODY)[0] == session:
                del self._live[site]

    def live(self) -> dict[str, float]:
        """Seconds since each site with a live session was heard."""
        with self._lock:
            now = self.clock()
            ages = {site: now - heard for site, (_, heard) in self._live.items()}
        return {site: age for site, age in ages.items() if age < LEASE_S}

    def _wait_s(self, site: str, session: str) -> float:
        """Seconds until another session's place is free; 0 or less where it is."""
        known, heard = self._live.get(site, _NOBODY)
        return 0.0 if known in ("", session) else heard + LEASE_S - self.clock()
