"""Which hospitals are there, what they were given, and bells for those who wait for either.

A site's own bell rings where something was sent to it. With one for all of them, each message to or
from one of n sites would make n held pulls look, which is n^2 calls to the SuperLink in a round.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

# A connected site is heard at least this often: held pulls and heartbeats come every few seconds.
GONE_AFTER_S = 75.0
# A site has one question at a time, and those that it is asked again.
_MOST_UNDER_WAY = 4


@dataclass(slots=True)
class _Place:
    """One site.

    given: messages that its present SuperNode got and has not answered. sent: those that it
        answered last; the answer's parts may still be on their way.
    """

    node_id: int
    heard: float
    given: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)


class Roster:
    """Shared by the tunnel, which learns, and the run, which asks. Safe for threads."""

    def __init__(self) -> None:
        # One lock, for the site's bells too.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._version = 0
        # By site: how often its bell has rung, and who waits for it.
        self._posted: dict[str, int] = {}
        # By site: the latest messages sent to it that no pull has brought it yet.
        self._under_way: dict[str, list[str]] = {}
        self._bells: dict[str, threading.Condition] = {}
        self._places: dict[str, _Place] = {}
        self._heard: dict[str, float] = {}
        self._moved: dict[str, float] = {}
        self._born = time.monotonic()
        self._lost: set[str] = set()
        self._broken: set[str] = set()

    def ring(self) -> None:
        """Wake everybody who waits."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    @property
    def version(self) -> int:
        """Grows with each ring; what `wait` wants to know."""
        return self._version

    def wait(self, version: int, timeout_s: float) -> int:
        """Until the bell has rung since `version`, or the time is over; returns the version."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)
            return self._version

    def post(self, site: str, message_id: str = "") -> None:
        """Something was sent to the site: wake who waits for that."""
        with self._changed:
            if message_id:
                sent = [*self._under_way.get(site, []), message_id]
                self._under_way[site] = sent[-_MOST_UNDER_WAY:]
            self._posted[site] = self._posted.get(site, 0) + 1
            if site in self._bells:
                self._bells[site].notify_all()

    def posted(self, site: str) -> int:
        """Grows with each `post`; what `wait_for_post` wants to know."""
        return self._posted.get(site, 0)

    def wait_for_post(self, site: str, posted: int, timeout_s: float) -> None:
        """Until something was sent to the site since `posted`, or the time is over."""
        with self._changed:
            bell = self._bells.setdefault(site, threading.Condition(self._lock))
            bell.wait_for(lambda: self.posted(site) != posted, timeout_s)

    def arrived(self, site: str, node_id: int) -> None:
        """A SuperNode of this site has started: what the one before it was given is lost."""
        with self._changed:
            before = self._places.get(site)
            if before is not None:
                self._lost |= before.given
                self._broken |= before.sent
            self._places[site] = _Place(node_id, time.monotonic())
            self._heard[site] = time.monotonic()
        self.post(site)  # a pull that is held for the SuperNode before it ends
        self.ring()

    def heard(self, site: str, node_id: int) -> None:
        """A call of this site was accepted."""
        with self._changed:
            place = self._places.setdefault(site, _Place(node_id, 0.0))
            place.node_id, place.heard = node_id, time.monotonic()
            self._heard[site] = place.heard

    def left(self, site: str) -> None:
        """The site's SuperNode has said goodbye."""
        with self._changed:
            gone = self._places.pop(site, None)
            if gone is not None:
                self._lost |= gone.given
                self._broken |= gone.sent
        self.ring()

    def broke_off(self, site: str) -> None:
        """A pull ended without an answer: the SuperLink may believe that it brought everything."""
        with self._changed:
            self._lost.update(self._under_way.pop(site, []))
        self.ring()

    def gave(self, site: str, message_ids: list[str]) -> None:
        """These messages are with the site now."""
        with self._changed:
            sent = self._under_way.get(site, [])
            self._under_way[site] = [m for m in sent if m not in message_ids]
            if site in self._places:
                self._places[site].given.update(message_ids)

    def got(self, site: str, message_ids: list[str]) -> None:
        """The site has answered these."""
        with self._changed:
            if site in self._places and message_ids:
                self._places[site].given.difference_update(message_ids)
                self._places[site].sent = set(message_ids)

    def moved(self, site: str) -> None:
        """A part of this site's answer has arrived, or word of one."""
        with self._changed:
            self._moved[site] = time.monotonic()

    def quiet_s(self, site: str) -> float:
        """Seconds since a part of an answer came from this site."""
        with self._changed:
            return time.monotonic() - self._moved.get(site, self._born)

    def answered_s(self, site: str, began: float) -> float:
        """Seconds from `began` (monotonic) to the last part of this site's answer that has come."""
        with self._changed:
            return max(0.0, self._moved.get(site, began) - began)

    def was_lost(self, message_id: str) -> bool:
        """Whether a SuperNode took this message with it, or nobody got it; said once."""
        with self._changed:
            if message_id not in self._lost:
                return False
            self._lost.discard(message_id)
            return True

    def was_broken(self, message_id: str) -> bool:
        """Whether the SuperNode that began to answer this message is gone, with what it had."""
        with self._changed:
            return message_id in self._broken

    def node_of(self, site: str) -> int | None:
        """The site's node; None where it is not connected."""
        with self._changed:
            place = self._places.get(site)
            if place is None or time.monotonic() - place.heard > GONE_AFTER_S:
                return None
            return place.node_id

    def away_s(self, site: str) -> float:
        """Seconds since the site was heard, if it is not connected now; 0 where it is.

        Who was never heard is away since this coordinator started.
        """
        if self.node_of(site) is not None:
            return 0.0
        with self._changed:
            return time.monotonic() - self._heard.get(site, self._born)

    def at_work(self) -> bool:
        """Whether a connected site has something that it has not answered."""
        return any(self._places[site].given for site in self.sites())

    def sites(self) -> list[str]:
        """Names of the connected sites, in order."""
        return sorted(site for site in list(self._places) if self.node_of(site) is not None)
