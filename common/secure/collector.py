"""The coordinator's side of a secure sum: it carries sealed shares, adds up, and takes masks off.

It needs no trust. What it could do wrong gives a sum that is noise, or is refused by the sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import numpy as np

from medfl.common.errors import FederationError, TooFewUpdates
from medfl.common.secure import exchange as said
from medfl.common.secure import shamir
from medfl.common.secure.exchange import Agreement, Outbox, Present, Revealed, Unmask
from medfl.common.secure.member import sign_of
from medfl.common.secure.rings import Ring, Words, add_stream, from_wire
from medfl.common.tensors import Array

Fits = Callable[[Agreement, str, int], bool]


class Collector:
    """One exchange, from the agreement to the sum.

    n: numbers of one update. One sum of them exists, however many sites there are.
    """

    def __init__(self, agreement: Agreement, ring: Ring, n: int) -> None:
        self._agreement, self._ring = agreement, ring
        self._sum: Words = np.zeros(n, ring.dtype)
        self._outboxes: dict[str, Outbox] = {}
        self._alive: list[str] = []

    def post(self, site: str, outbox: Outbox) -> None:
        """Keep a site's sealed shares. Raises FederationError unless there is one a site."""
        if outbox.shares.keys() != set(self._agreement.sites):
            raise FederationError("Shares are sealed for other sites than agreed.")
        self._outboxes[site] = outbox

    def present(self) -> Present:
        """Who has shared. Raises TooFewUpdates below the threshold."""
        self._refuse_few(self._outboxes, "shared their keys")
        return Present(tuple(sorted(self._outboxes)))

    def add(self, site: str, masked: Array) -> bool:
        """Add a masked update; False where it has not the agreed form, or is nobody's."""
        words = from_wire(masked, len(self._sum), self._ring)
        if words is None or site not in self._outboxes or site in self._alive:
            return False
        self._sum += words
        self._alive.append(site)
        return True

    def ask(self, site: str) -> Unmask:
        """What a living site is asked. Raises TooFewUpdates below the threshold."""
        self._refuse_few(self._alive, "sent an update")
        dead = sorted(set(self._outboxes) - set(self._alive))
        inbox = {sender: box.shares[site] for sender, box in self._outboxes.items()}
        return Unmask(tuple(sorted(self._alive)), tuple(dead), inbox)

    def total(self, revealed: Mapping[str, Revealed]) -> Words:
        """The sum of the living sites' integers, modulo the ring.

        Raises:
            TooFewUpdates: fewer sites than the threshold gave their shares, or these do not fit.
        """
        alive, present = sorted(self._alive), tuple(sorted(self._outboxes))
        dead = [site for site in present if site not in alive]
        sound = {s: r for s, r in revealed.items() if _is_about(r, alive, dead)}
        self._refuse_few(sound, "gave their shares")
        total = self._sum.copy()
        for site in alive:
            own = self._secret(site, {s: r.own[site] for s, r in sound.items()}, _is_own)
            add_stream(total, said.own_stream(self._agreement, site, own), -1)
        for site in dead:
            shares = {s: r.masking[site] for s, r in sound.items()}
            masking = self._secret(site, shares, _is_masking)
            for peer in alive:
                key = said.pair_stream(self._agreement, present, masking, site, peer)
                add_stream(total, key, -sign_of(peer, site))
        return total

    def _secret(self, site: str, shares: Mapping[str, str], fits: Fits) -> int:
        """From the first shares that give what the site has committed itself to."""
        holders, needed = sorted(shares), self._agreement.threshold
        for first in range(len(holders)):
            # One false share is outrun: some run of holders is without it, if one is to spare.
            taken = sorted([*holders, *holders][first : first + needed])
            points = tuple(self._agreement.sites.index(s) + 1 for s in taken)
            values = [said.integer(shares[s]) for s in taken]
            secret = shamir.join(_weights(points), values)
            if fits(self._agreement, site, secret):
                return secret
        raise TooFewUpdates(f"The shares of {site} do not fit; the round is void.")

    def _refuse_few(self, found: Iterable[str], what: str) -> None:
        n = len(list(found))
        if n < self._agreement.threshold:
            raise TooFewUpdates(
                f"{n} sites {what}; a secure sum of {len(self._agreement.adverts)} needs "
                f"{self._agreement.threshold}."
            )


@lru_cache(maxsize=8)
def _weights(points: tuple[int, ...]) -> list[int]:
    return shamir.weights_at_zero(points)


def _is_own(agreement: Agreement, site: str, secret: int) -> bool:
    return said.commitment(site, secret) == agreement.by_site[site].own


def _is_masking(agreement: Agreement, site: str, secret: int) -> bool:
    return said.public_of(secret) == agreement.by_site[site].masking


def _is_about(revealed: Revealed, alive: Iterable[str], dead: Iterable[str]) -> bool:
    """Whether there is one share of each site, and each is an element of the field."""
    if revealed.own.keys() != set(alive) or revealed.masking.keys() != set(dead):
        return False
    try:
        for text in (*revealed.own.values(), *revealed.masking.values()):
            said.integer(text)
    except ValueError:
        return False
    return True
