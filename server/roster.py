"""The hospitals of one run: who takes part, and questions to them by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from medfl.common import statistics
from medfl.common.errors import FederationError
from medfl.common.messages import Instruction, Reply
from medfl.common.statistics import LocalStatistics, Shared
from medfl.common.study import Study
from medfl.common.unlike import unlike
from medfl.server.records import named
from medfl.strategies.admission import cleaned, is_case_count

log = logging.getLogger(__name__)

# As in site.toml; another text could name a file or a person.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

# An answer that did not come in time may come when it is asked for again.
UNANSWERED = ("not connected", "late", "no answer")
_TRIES = 3

# Site name -> address, in order of the names: sums must not depend on who came first.
Roster = Mapping[str, str]


class Sites(Protocol):
    """The hospitals as the coordinator reaches them."""

    def names(self) -> list[str]:
        """Addresses of all hospitals, in a fixed order."""

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        """Send each instruction to its address; yield the replies in the order asked."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Who takes part, with how many training cases, what they share, and who refused why.

    unlike: by hospital, the fields whose values are far from the other hospitals' (`unlike`).
    evaluators: hospitals that train nothing and are asked at the end (external validation).
    """

    roster: Roster
    cases: Mapping[str, int]
    shared: Shared
    refused: dict[str, str]
    unlike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluators: Roster = field(default_factory=dict)


def prepare(
    study: Study, sites: Sites, say: Instruction, closed: set[str] | None = None
) -> Prepared:
    """Ask all hospitals. closed: gets the addresses of those that answered, and take no part.

    Raises:
        FederationError: fewer than federation.min_sites take part.
    """
    addresses = sites.names()
    found: dict[str, str] = {}
    parts: dict[str, LocalStatistics] = {}
    cases: dict[str, int] = {}
    refused: dict[str, str] = {}
    evaluators: dict[str, str] = {}
    for address, reply in zip(addresses, sites.ask((a, say) for a in addresses), strict=True):
        part, why = _part_of(cleaned(reply, ()))
        name = reply.site if _NAME.fullmatch(reply.site) else address
        if _only_evaluates(reply) and name not in found | evaluators:
            evaluators[name] = address
        elif part is None or name in found | evaluators:
            refused[name] = why or "two sites have this name"
            if closed is not None and why not in UNANSWERED:
                closed.add(address)
            log.warning("site=%s takes no part: %s", name, refused[name])
        else:
            found[name], parts[name], cases[name] = address, part, reply.n_cases
    if len(found) < max(1, study.federation.min_sites):
        raise FederationError(
            f"{len(found)} of {len(addresses)} sites can take part; the study needs "
            f"{study.federation.min_sites}. Left out: {named(refused)}. "
            "Run `medfl-client check` at each of them."
        )
    ordered = sorted(found)
    shared = statistics.merge(parts[n] for n in ordered)
    odd = unlike(parts)
    for name, fields in odd.items():
        log.warning("site=%s is unlike the others: %s", name, "; ".join(fields))
    return Prepared(
        {n: found[n] for n in ordered},
        cases,
        shared,
        refused,
        odd,
        dict(sorted(evaluators.items())),
    )


def _only_evaluates(reply: Reply) -> bool:
    return reply.evaluates and not reply.refusal


@dataclass(slots=True)
class Latecomers:
    """Who may still join: hospitals that were not there, or late, when the others prepared.

    They train with what the others share, to which they add nothing. closed: addresses that
    answered and take no part. tries: questions by address.
    """

    study: Study
    sites: Sites
    closed: set[str] = field(default_factory=set)
    tries: dict[str, int] = field(default_factory=dict)

    def join(self, prepared: Prepared, say: Instruction) -> Prepared:
        """`prepared` with those who can take part from now on. say: as `prepare` was asked.

        A secure sum keeps its set of hospitals, and [site_privacy] its sampling: nobody joins them.
        """
        if self.study.secure_aggregation is not None or self.study.site_privacy is not None:
            return prepared
        wanted = [a for a in self.sites.names() if self._may_join(a, prepared)]
        for address in wanted:
            self.tries[address] = self.tries.get(address, 0) + 1
        replies = self.sites.ask((a, say) for a in wanted)
        for address, reply in zip(wanted, replies, strict=True):
            if reply.refusal not in UNANSWERED:
                self.closed.add(address)
            prepared = _joined(prepared, address, reply)
        return prepared

    def _may_join(self, address: str, prepared: Prepared) -> bool:
        taken = {*prepared.roster.values(), *prepared.evaluators.values()}
        if address in taken or address in self.closed:
            return False
        if self.tries.get(address, 0) >= _TRIES:
            return False
        return prepared.refused.get(address, UNANSWERED[0]) in UNANSWERED


def _joined(prepared: Prepared, address: str, reply: Reply) -> Prepared:
    part, why = _part_of(cleaned(reply, ()))
    name = reply.site if _NAME.fullmatch(reply.site) else address
    if name in prepared.roster or name in prepared.evaluators:
        name, why = address, "two sites have this name"
    elif _only_evaluates(reply):
        log.warning("site=%s joins, to evaluate only", name)
        evaluators = dict(sorted({**prepared.evaluators, name: address}.items()))
        refused = {n: w for n, w in prepared.refused.items() if n not in (name, address)}
        return replace(prepared, evaluators=evaluators, refused=refused)
    elif part is not None and part.private and not prepared.shared.private:
        why = "trains under differential privacy, and the model was made without such hospitals"
    if part is None or why:
        log.warning("site=%s does not join: %s", name, why)
        return replace(prepared, refused={**prepared.refused, name: why})
    log.warning("site=%s joins", name)
    roster = {**prepared.roster, name: address}
    refused = {n: w for n, w in prepared.refused.items() if n not in (name, address)}
    return replace(
        prepared,
        roster={n: roster[n] for n in sorted(roster)},
        cases={**prepared.cases, name: reply.n_cases},
        refused=refused,
    )


def _part_of(reply: Reply) -> tuple[LocalStatistics | None, str]:
    if reply.refusal:
        return None, reply.refusal
    if not is_case_count(reply.n_cases):
        return None, "case count out of range"
    try:
        return statistics.local_from_plain(reply.statistics), ""
    except (TypeError, KeyError, ValueError, AttributeError):
        return None, "statistics that cannot be read"


def ask(sites: Sites, roster: Roster, asked: Instruction) -> Iterator[Reply]:
    """Replies under the names that the sites took part with."""
    return ask_each(sites, roster, dict.fromkeys(roster, asked))


def ask_each(sites: Sites, roster: Roster, asked: Mapping[str, Instruction]) -> Iterator[Reply]:
    """The same, where each site is asked something of its own; in the order of `asked`."""
    replies = iter(sites.ask((roster[name], one) for name, one in asked.items()))
    # Nothing here may hold a reply while the next one comes: each is as large as the model.
    for name, one in asked.items():
        yield _named(name, one, next(replies))


def _named(name: str, asked: Instruction, reply: Reply) -> Reply:
    why = reply.refusal
    if not why and (reply.site, reply.round) != (name, asked.round):
        why = "answer to another question"
    if why:
        return Reply(site=name, round=asked.round, refusal=why, answered=reply.answered)
    return reply
