"""The hospital in a secure sum: keys before a round, a masked update in it, shares after it.

Keys and shares of the next round ride on this round's answers where the coordinator asks for them.
What a site knows of an exchange lies in `state/secure`, readable by nobody else, and is written
before the answer leaves: after a crash it masks nothing twice, and takes masks off for no second
sum. The secrets serve one round; those of the last two rounds are kept, and no backup has them
(`.once`). With whom each model's updates were summed stays for ever, over all runs (`sums.jsonl`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict

from medfl.client.by_round import ByRound
from medfl.client.journal import Journal
from medfl.common import tensors
from medfl.common.errors import ConfigError, FederationError, NotFinite, PolicyRefused
from medfl.common.kept import load_record, save_record
from medfl.common.messages import Instruction, Reply
from medfl.common.packing import WITH_FEEDBACK
from medfl.common.secure import member as steps
from medfl.common.secure.exchange import (
    Advert,
    Agreement,
    Exchange,
    Outbox,
    Present,
    Unmask,
    Unmasked,
    as_plain,
    from_plain,
    threshold_of,
)
from medfl.common.secure.member import Member
from medfl.common.secure.rings import Words, to_wire
from medfl.common.secure.updates import Scale, from_words, scale_of, shortened, to_words
from medfl.common.signing import SigningKey, public_of
from medfl.common.study import SecureAggregation
from medfl.common.tensors import Tensors
from medfl.strategies.catalogue import WEIGHTINGS

if TYPE_CHECKING:
    from medfl.client.hospital import Hospital

log = logging.getLogger(__name__)

MASKED = "masked"
_ONE_SET = (
    "Updates of this model were summed before over other sites; not a second time. Start the run "
    "with all the hospitals of before, or from other weights (another --seed)."
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What this site signs with, and the pinned key (hex) of each site, itself included."""

    key: SigningKey
    key_of: Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Summed:
    """For whom masks were taken off updates of one model. model: digest of its weights."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    model: str
    alive: tuple[str, ...]


def simulated_identity(site: str) -> Identity:
    """An identity that everybody can derive, where all hospitals are on one machine anyway."""

    def key(name: str) -> SigningKey:
        seed = hashlib.sha256(b"medfl simulated identity\n" + name.encode()).digest()
        return Ed25519PrivateKey.from_private_bytes(seed)

    return Identity(key(site), lambda name: public_of(key(name)))


def keys(hospital: Hospital, asked: Instruction) -> Reply:
    """Make this round's keys."""
    _agreed(hospital)
    return Reply(site=hospital.name, secure=as_plain(_new_keys(hospital, _exchange(asked))))


def shares(hospital: Hospital, asked: Instruction) -> Reply:
    """Check everybody's keys, and share this site's secrets with those who hold them."""
    outbox = _shared(hospital, _exchange(asked), from_plain(asked.secure, Agreement))
    return Reply(site=hospital.name, secure=as_plain(outbox))


def _new_keys(hospital: Hospital, exchange: Exchange) -> Advert:
    member = steps.advertise(exchange, hospital.name, _identity(hospital).key)
    _keep(hospital, member)
    return member.advert


def _shared(hospital: Hospital, exchange: Exchange, agreement: Agreement) -> Outbox:
    member, outbox = steps.agree(
        _member(hospital, exchange),
        agreement,
        threshold=threshold_of(_agreed(hospital).threshold, len(agreement.adverts)),
        fewest=hospital.policy.min_sum_sites,
        key_of=_identity(hospital).key_of,
    )
    _keep(hospital, member)
    return outbox


def expect(hospital: Hospital, asked: Instruction) -> None:
    """Refuse now, before privacy and time are spent, what `masked` would refuse later."""
    if hospital.study.secure_aggregation is not None:
        present = from_plain(asked.secure, Present)
        fewest = hospital.policy.min_sum_sites
        steps.expected(_member(hospital, _exchange(asked)), present, fewest=fewest)
        before = _summed(hospital, asked.model)
        if before is not None and not set(before.alive) <= set(present.sites):
            raise PolicyRefused(_ONE_SET)


def masked(hospital: Hospital, asked: Instruction, reply: Reply) -> Reply:
    """The reply to a round with its update masked, where the study wants it so.

    Raises:
        NotFinite: the update has NaN or infinities.
        PolicyRefused: an update was masked with these keys already.
    """
    if asked.kind != "round" or hospital.study.secure_aggregation is None:
        return reply
    exchange, present = _exchange(asked), from_plain(asked.secure, Present)
    member = _member(hospital, exchange)
    fewest = hospital.policy.min_sum_sites
    agreement = steps.expected(member, present, fewest=fewest)
    words, scale = _words(hospital, asked, reply, agreement)
    member, under = steps.mask(member, present, words, fewest=fewest)
    _keep(hospital, replace(member, model=asked.model))
    told = as_plain(_new_keys(hospital, _after(exchange))) if present.ahead else {}
    return replace(reply, delta={MASKED: to_wire(under, scale.ring)}, control={}, secure=told)


def unmask(hospital: Hospital, asked: Instruction) -> Reply:
    """This site's shares of the living sites' own masks and of the dead ones' masking keys.

    Updates of one model are summed over one set of sites, in whatever run, round or attempt they
    are asked for: the difference of two sums would be the update of who is missing in one.
    """
    wanted, exchange = from_plain(asked.secure, Unmask), _exchange(asked)
    member, revealed = steps.unmask(
        _member(hospital, exchange), wanted, fewest=hospital.policy.min_sum_sites
    )
    before = _summed(hospital, member.model)
    if before is not None and set(before.alive) != set(wanted.alive):
        raise PolicyRefused(_ONE_SET)
    if before is None:
        _sums(hospital).append(Summed(member.model, wanted.alive))
    _keep(hospital, member)
    ahead = None if wanted.ahead is None else _ahead(hospital, exchange, wanted.ahead)
    return Reply(site=hospital.name, secure=as_plain(Unmasked(revealed, ahead)))


def _ahead(hospital: Hospital, exchange: Exchange, agreement: Agreement) -> Outbox | None:
    """Shares for the next round; a fault in what is to be agreed costs this round nothing."""
    try:
        return _shared(hospital, _after(exchange), agreement)
    except (FederationError, PolicyRefused) as error:
        log.warning("round=%d the next one is not agreed ahead: %s", exchange.round, error)
        return None


def _words(
    hospital: Hospital, asked: Instruction, reply: Reply, agreement: Agreement
) -> tuple[Words, Scale]:
    """The update as integers. What int8 and int4 round away is kept for the next round."""
    study, secure = hospital.study, _agreed(hospital)
    if not (tensors.all_finite(reply.delta) and tensors.all_finite(reply.control)):
        raise NotFinite("Training gave an update that is not finite; nothing is sent.")
    weight = WEIGHTINGS[study.federation.weighting](reply.n_cases)
    if weight > agreement.weight_cap:
        raise PolicyRefused("This site's weight is above what the coordinator says is the largest.")
    scale = scale_of(study, len(agreement.adverts), agreement.weight_cap)
    delta = shortened(reply.delta, secure.max_norm)
    residuals = ByRound(hospital.state, "residual")
    if study.federation.updates in WITH_FEEDBACK:
        before = residuals.as_of(asked.round - 1)
        delta = {n: a + before[n] if n in before else a for n, a in delta.items()}
    words, beyond = to_words(delta, reply.control, weight, scale)
    if beyond:
        log.warning(
            "round=%d %d of %d changes were cut off at secure_aggregation.range",
            asked.round,
            beyond,
            len(words),
        )
    if study.federation.updates in WITH_FEEDBACK:
        shapes = {n: a.shape for n, a in delta.items()}
        controls = {n: a.shape for n, a in reply.control.items()}
        sent, _ = from_words(words, shapes, controls, weight, 1, scale)
        residuals.save(asked.round, _left_over(delta, sent, scale.limit))
    return words, scale


def _left_over(delta: Tensors, sent: Tensors, limit: float) -> Tensors:
    """What rounding took away; what the range cut off is gone, or it would pile up."""
    return {n: (a.clip(-limit, limit) - sent[n]).astype(a.dtype) for n, a in delta.items()}


def _agreed(hospital: Hospital) -> SecureAggregation:
    secure = hospital.study.secure_aggregation
    if secure is None:
        raise FederationError("The study has no secure aggregation, and a step of it is asked.")
    return secure


def _identity(hospital: Hospital) -> Identity:
    if hospital.simulated:
        return simulated_identity(hospital.name)
    if hospital.identity is None:
        raise ConfigError("This hospital has no signing key, which secure aggregation needs.")
    return hospital.identity


def _exchange(asked: Instruction) -> Exchange:
    return Exchange(asked.study_digest, asked.run, asked.round, asked.attempt)


def _after(exchange: Exchange) -> Exchange:
    return replace(exchange, round=exchange.round + 1)


def _member(hospital: Hospital, exchange: Exchange) -> Member:
    member = load_record(_file(hospital, exchange.round), Member)
    if member is None or member.exchange != exchange:
        raise FederationError("No keys were made here for this round; it begins with them.")
    return member


def _keep(hospital: Hospital, member: Member) -> None:
    """On disk before anything leaves; of other rounds, only the one before is kept."""
    round_ = member.exchange.round
    wanted = {_file(hospital, round_), _file(hospital, round_ - 1)}
    if not member.present:
        for file in _folder(hospital).glob("member-*.once"):
            if file not in wanted:
                file.unlink()
    save_record(_file(hospital, round_), member)


def _file(hospital: Hospital, round_: int) -> Path:
    return _folder(hospital) / f"member-{round_:05d}.once"


def _summed(hospital: Hospital, model: str) -> Summed | None:
    """The sum that updates of this model were in, over all runs of the study."""
    found = (one for one in _sums(hospital).lines() if one.model == model)
    return next(found, None)


def _sums(hospital: Hospital) -> Journal[Summed]:
    return Journal(_folder(hospital) / "sums.jsonl", Summed)


def _folder(hospital: Hospital) -> Path:
    return hospital.state / "secure"
