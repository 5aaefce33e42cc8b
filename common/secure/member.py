"""A site's side of a secure sum: four steps, each of which refuses what would give its update away.

    advertise -> agree -> mask -> unmask

A `Member` holds the secrets of one exchange. Whoever keeps it stores each step's member before the
step's answer leaves, so that no step can be taken twice with two meanings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict

from medfl.common.errors import FederationError, PolicyRefused
from medfl.common.secure import exchange as said
from medfl.common.secure import shamir
from medfl.common.secure.exchange import (
    Advert,
    Agreement,
    Exchange,
    Outbox,
    Present,
    Revealed,
    Unmask,
)
from medfl.common.secure.rings import Words, add_stream
from medfl.common.signing import SigningKey

KeyOf = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Member:
    """One site in one exchange, with its secrets (hex).

    present: whom the update was masked with; () before. alive: whom masks were taken off for.
    model: digest of the weights that the update began at, for whoever keeps the member.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    exchange: Exchange
    site: str
    advert: Advert
    sharing: str
    masking: str
    own: str
    agreement: Agreement | None = None
    present: tuple[str, ...] = ()
    alive: tuple[str, ...] = ()
    model: str = ""

    def __repr__(self) -> str:
        return f"Member({self.site}, {self.exchange})"


def advertise(exchange: Exchange, site: str, identity: SigningKey) -> Member:
    """A member with new secrets; what it tells everybody is its `advert`."""
    sharing, masking, own = (shamir.new_secret() for _ in range(3))
    bare = Advert(
        site=site,
        sharing=said.public_of(sharing),
        masking=said.public_of(masking),
        own=said.commitment(site, own),
    )
    return Member(
        exchange=exchange,
        site=site,
        advert=said.signed_advert(exchange, bare, identity),
        sharing=said.as_hex(sharing),
        masking=said.as_hex(masking),
        own=said.as_hex(own),
    )


def agree(
    member: Member, agreement: Agreement, *, threshold: int, fewest: int, key_of: KeyOf
) -> tuple[Member, Outbox]:
    """Check what is to be agreed, and share the two secrets with everybody.

    threshold: what this site's own copy of the study asks for among so many sites.
    fewest: sites that this site's policy asks for, itself counted. key_of: a site's pinned key.

    Raises:
        PolicyRefused: a key that no pinned identity has signed for this exchange, too few sites, a
            threshold at or below half, or a second sharing of the same secrets.
        FederationError: another exchange than this member's, or keys that are none.
    """
    if member.agreement is not None:
        raise PolicyRefused("The secrets of this round are shared already; not a second time.")
    _refuse_other(member, agreement)
    n = len(agreement.adverts)
    if 2 * agreement.threshold <= n or agreement.threshold > n:
        raise PolicyRefused(
            f"A threshold of {agreement.threshold} for {n} sites is not above half of them: two "
            "halves could be told two things."
        )
    if agreement.threshold != threshold:
        raise PolicyRefused("The coordinator's threshold is not the study's.")
    _refuse_few(n, fewest)
    for advert in agreement.adverts:
        public = key_of(advert.site)
        if public is None:
            raise PolicyRefused(
                f"{advert.site} is not among the hospitals whose keys this one has approved. If it "
                "may take part, approve the study again."
            )
        if not said.is_genuine(agreement.exchange, advert, public):
            raise PolicyRefused(
                f"The keys in the name of {advert.site} are not signed by it for this round."
            )
    return replace(member, agreement=agreement), _shared_out(member, agreement)


def _refuse_other(member: Member, agreement: Agreement) -> None:
    if agreement.exchange != member.exchange:
        raise FederationError("The keys belong to another run, round or attempt.")
    if list(agreement.sites) != sorted(set(agreement.sites)):
        raise FederationError("The sites of a secure sum come once each, in order of name.")
    if agreement.by_site.get(member.site) != member.advert:
        raise PolicyRefused("The keys in this site's name are not those that it made.")


def _shared_out(member: Member, agreement: Agreement) -> Outbox:
    """A sealed pair of shares for each site, this one included."""
    n, threshold = len(agreement.adverts), agreement.threshold
    masking = shamir.split(said.integer(member.masking), threshold, n)
    own = shamir.split(said.integer(member.own), threshold, n)
    secret = said.integer(member.sharing)
    return Outbox(
        {
            peer: said.seal_shares(agreement, secret, member.site, peer, one, other)
            for peer, one, other in zip(agreement.sites, masking, own, strict=True)
        }
    )


def mask(member: Member, present: Present, words: Words, *, fewest: int) -> tuple[Member, Words]:
    """`words` under this site's own stream and one a pair.

    Raises:
        PolicyRefused: too few sites, or masked already in this exchange: the difference of two
            updates under the same streams is theirs.
        FederationError: nothing was agreed, or sites that are not in it.
    """
    agreement = expected(member, present, fewest=fewest)
    masked = words.copy()
    own = said.own_stream(agreement, member.site, said.integer(member.own))
    add_stream(masked, own, 1)
    secret = said.integer(member.masking)
    for peer in present.sites:
        if peer != member.site:
            key = said.pair_stream(agreement, present.sites, secret, member.site, peer)
            add_stream(masked, key, sign_of(member.site, peer))
    return replace(member, present=present.sites), masked


def expected(member: Member, present: Present, *, fewest: int) -> Agreement:
    """The agreement that `mask` would work under; raises what it would, before any training."""
    agreement = member.agreement
    if agreement is None:
        raise FederationError("Nothing was agreed for this round; no update is sent.")
    if member.present:
        raise PolicyRefused("An update of this round was masked already; not a second time.")
    known = set(agreement.sites)
    if list(present.sites) != sorted(known & set(present.sites)) or (
        member.site not in present.sites
    ):
        raise FederationError("Masks are asked for among other sites than agreed.")
    _refuse_few(len(present.sites), max(fewest, agreement.threshold))
    return agreement


def sign_of(site: str, peer: str) -> int:
    """The sign of a pair's stream at `site`; at `peer` it is the other one."""
    return 1 if site < peer else -1


def unmask(member: Member, asked: Unmask, *, fewest: int) -> tuple[Member, Revealed]:
    """One share a site: of the living the own mask's, of the dead the masking key's.

    Raises:
        PolicyRefused: a site is called alive and dead, too few are alive, this one is called dead,
            or it was asked about others before.
        FederationError: no update was masked, or shares that were not sealed for this site.
    """
    agreement = member.agreement
    if agreement is None or not member.present:
        raise FederationError("No update of this round was masked here; no mask is taken off.")
    _refuse_two_faces(member, asked)
    _refuse_few(len(asked.alive), max(fewest, agreement.threshold))
    secret = said.integer(member.sharing)
    own, masking = {}, {}
    for peer in member.present:
        if peer not in asked.inbox:
            raise FederationError(f"The shares of {peer} were not handed on.")
        of_masking, of_own = said.open_shares(
            agreement, secret, member.site, peer, asked.inbox[peer]
        )
        if peer in asked.alive:
            own[peer] = said.as_hex(of_own)
        else:
            masking[peer] = said.as_hex(of_masking)
    return replace(member, alive=asked.alive), Revealed(own, masking)


def _refuse_two_faces(member: Member, asked: Unmask) -> None:
    if both := sorted(set(asked.alive) & set(asked.dead)):
        raise PolicyRefused(
            f"{', '.join(both)} is called alive and dead; both shares would give its update away."
        )
    if member.site not in asked.alive:
        raise PolicyRefused("This site has sent its update and is called dead.")
    told = sorted({*asked.alive, *asked.dead})
    if told != sorted(member.present) or len(told) != len(asked.alive) + len(asked.dead):
        raise PolicyRefused("Masks are to be taken off for other sites than they were made for.")
    if member.alive and set(member.alive) != set(asked.alive):
        raise PolicyRefused("Masks of this round were taken off already, for another sum.")


def _refuse_few(n: int, fewest: int) -> None:
    if n < fewest:
        raise PolicyRefused(
            f"A sum over {n} sites hides too little: at least {fewest} are needed here."
        )
