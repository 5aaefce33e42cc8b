"""A secure sum played between values in this process; each step's messages can be looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.common.secure.collector import Collector
from medfl.common.secure.exchange import Agreement, Exchange, Present, Revealed, threshold_of
from medfl.common.secure.member import Member, advertise, agree, mask, unmask
from medfl.common.secure.rings import Ring, Words, to_wire
from medfl.common.signing import public_of

FULL = Ring(4)
EXCHANGE = Exchange(study="s" * 64, run="main", round=3, attempt=0)


@dataclass
class Table:
    """Sites around a table, and all that lies on it: what a coordinator receives."""

    names: tuple[str, ...]
    ring: Ring = FULL
    share: float = 2 / 3
    fewest: int = 2
    exchange: Exchange = EXCHANGE
    received: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identities = {n: Ed25519PrivateKey.generate() for n in self.names}
        self.members: dict[str, Member] = {}

    def key_of(self, site: str) -> str | None:
        key = self.identities.get(site)
        return None if key is None else public_of(key)

    def advertise(self, but: Collection[str] = ()) -> Agreement:
        self.members = {
            n: advertise(self.exchange, n, self.identities[n]) for n in self.names if n not in but
        }
        threshold = threshold_of(self.share, len(self.members))
        adverts = tuple(self.members[n].advert for n in sorted(self.members))
        return Agreement(self.exchange, threshold, 64, adverts)

    def agree(self, site: str, agreement: Agreement):
        threshold = threshold_of(self.share, len(agreement.adverts))
        self.members[site], outbox = agree(
            self.members[site],
            agreement,
            threshold=threshold,
            fewest=self.fewest,
            key_of=self.key_of,
        )
        return outbox

    def mask(self, site: str, present: Present, words: Words) -> Words:
        self.members[site], masked = mask(self.members[site], present, words, fewest=self.fewest)
        return masked

    def unmask(self, site: str, asked) -> Revealed:
        self.members[site], revealed = unmask(self.members[site], asked, fewest=self.fewest)
        return revealed

    def play(
        self,
        updates: dict[str, Words],
        *,
        no_keys: Collection[str] = (),
        no_shares: Collection[str] = (),
        no_update: Collection[str] = (),
        no_unmasking: Collection[str] = (),
        order: Callable[[Iterable[str]], Iterable[str]] = sorted,
    ) -> Words:
        """The sum as the coordinator gets it, where some sites fall silent at each step."""
        agreement = self.advertise(no_keys)
        collector = Collector(agreement, self.ring, len(next(iter(updates.values()))))
        for site in order(agreement.sites):
            if site not in no_shares:
                collector.post(site, self.agree(site, agreement))
        present = collector.present()
        for site in order(present.sites):
            if site not in no_update:
                sent = to_wire(self.mask(site, present, updates[site]), self.ring)
                self.received.append(sent.tobytes())
                assert collector.add(site, sent)
        alive = [s for s in present.sites if s not in no_update]
        revealed = {
            s: self.unmask(s, collector.ask(s)) for s in order(alive) if s not in no_unmasking
        }
        return collector.total(revealed)


@pytest.fixture
def updates() -> Callable[..., dict[str, Words]]:
    """updates(names, ring, n): small integers of both signs as words of the ring, by site."""

    def make(names: Iterable[str], ring: Ring = FULL, n: int = 1000) -> dict[str, Words]:
        rng = np.random.default_rng(5)
        return {s: rng.integers(-900, 900, n).astype(ring.dtype) for s in names}

    return make


@pytest.fixture
def table() -> type[Table]:
    """Table(names, ...): a secure sum among them."""
    return Table
