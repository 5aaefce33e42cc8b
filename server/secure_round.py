"""One round whose updates are summed under masks: the coordinator sees their sum alone.

    keys -> shares -> round (masked updates) -> unmask -> mean

Where all sites take part in every round, the keys of the next one come with the masked updates and
its shares with the unmasking: then a round is two exchanges, and four after a site fell silent.

A site that falls silent at one step is asked nothing more in this round. Names, types and sizes
of updates, and their weights, are checked as ever; length and finiteness are not to be seen, and
are the hospitals' to keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from medfl.common.errors import FederationError, TooFewUpdates
from medfl.common.messages import Instruction, Reply
from medfl.common.secure.collector import Collector
from medfl.common.secure.exchange import (
    Advert,
    Agreement,
    Exchange,
    Outbox,
    Revealed,
    Unmasked,
    as_plain,
    from_plain,
    threshold_of,
)
from medfl.common.secure.updates import Scale, Shapes, cap_of, from_words, length, scale_of
from medfl.common.study import Study
from medfl.common.tensors import Tensors
from medfl.server.records import size
from medfl.strategies.admission import is_case_count
from medfl.strategies.catalogue import WEIGHTINGS
from medfl.strategies.strategy import Combined

log = logging.getLogger(__name__)

Ask = Callable[[Mapping[str, Instruction]], Iterator[Reply]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Terms:
    """What stays the same over all rounds.

    cases: training cases that each site announced. travels: parameters that sites send.
    ask: asks each of these sites its instruction, in this order.
    """

    study: Study
    cases: Mapping[str, int]
    travels: frozenset[str]
    ask: Ask


@dataclass(frozen=True, slots=True)
class Ahead:
    """A round's agreement and everybody's sealed shares, from the round before."""

    agreement: Agreement
    outboxes: Mapping[str, Outbox]


class SecureRound:
    """One round; afterwards, what is to be told of it: `replies`, `left_out`, `bytes_up`.

    ahead: what the round before has left for this one; afterwards, what this leaves for the next.
    """

    def __init__(
        self, terms: Terms, drawn: list[str], asked: Instruction, ahead: Ahead | None = None
    ) -> None:
        self._terms, self._drawn, self._asked = terms, drawn, asked
        self._given = ahead
        self.ahead: Ahead | None = None
        self._next: dict[str, Advert] = {}
        self.replies: list[Reply] = []
        self.left_out: dict[str, str] = {}
        self.bytes_up = 0

    def combined(self) -> Combined:
        """The mean of the admitted updates.

        Raises:
            TooFewUpdates: fewer sites than the threshold were left at some step.
        """
        agreement = self._given.agreement if self._given else self._agreement()
        scale = scale_of(self._terms.study, len(agreement.adverts), agreement.weight_cap)
        shapes, controls = self._shapes()
        collector = Collector(agreement, scale.ring, length(shapes) + length(controls))
        if self._given:
            for site, outbox in self._given.outboxes.items():
                collector.post(site, outbox)
        else:
            self._collect_shares(agreement, collector)
        self._collect_updates(collector)
        total = collector.total(self._revealed(collector))
        return self._mean(total, shapes, controls, scale)

    def buffers(self) -> Tensors:
        """None: a model with running statistics is refused under masks."""
        return {}

    def _agreement(self) -> Agreement:
        adverts = {}
        for reply, advert in self._answers({site: {} for site in self._drawn}, "keys", Advert):
            if advert.site == reply.site:
                adverts[reply.site] = advert
            else:
                self._leave_out(reply.site, "keys in another name")
        study = self._terms.study
        if len(adverts) < study.federation.min_sites:
            raise TooFewUpdates(f"{len(adverts)} sites gave keys for a secure sum.")
        return self._agreed(adverts, self._asked.round)

    def _agreed(self, adverts: Mapping[str, Advert], round_: int) -> Agreement:
        study, asked = self._terms.study, self._asked
        weigh = WEIGHTINGS[study.federation.weighting]
        share = study.secure_aggregation.threshold if study.secure_aggregation else 1.0
        return Agreement(
            exchange=Exchange(asked.study_digest, asked.run, round_, asked.attempt),
            threshold=threshold_of(share, len(adverts)),
            weight_cap=cap_of(max(weigh(self._terms.cases[site]) for site in self._drawn)),
            adverts=tuple(adverts[site] for site in sorted(adverts)),
        )

    def _collect_shares(self, agreement: Agreement, collector: Collector) -> None:
        said = dict.fromkeys(agreement.sites, as_plain(agreement))
        for reply, outbox in self._answers(said, "shares", Outbox):
            try:
                collector.post(reply.site, outbox)
            except FederationError:
                self._leave_out(reply.site, "shares for other sites")

    def _collect_updates(self, collector: Collector) -> None:
        present = replace(collector.present(), ahead=self._looks_ahead())
        asked = replace(self._asked, secure=as_plain(present))
        for reply in self._terms.ask(dict.fromkeys(present.sites, asked)):
            self.bytes_up += size(reply.delta) + size(reply.control)
            fault = reply.refusal or _fault_of(reply, self._terms.cases[reply.site])
            if not fault and not collector.add(reply.site, *reply.delta.values()):
                fault = "masked update of another form"
            if fault:
                self._leave_out(reply.site, fault)
            else:
                self.replies.append(replace(reply, delta={}, control={}, secure={}))
                if (advert := _read(reply, Advert)) is not None and advert.site == reply.site:
                    self._next[reply.site] = advert

    def _looks_ahead(self) -> bool:
        """Whether the next round has the same sites; a drawn subset is known only then."""
        federation = self._terms.study.federation
        everybody = len(self._drawn) == len(self._terms.cases)
        return everybody and self._asked.round < federation.rounds

    def _revealed(self, collector: Collector) -> dict[str, Revealed]:
        alive = [reply.site for reply in self.replies]
        ahead = None
        if set(self._next) == set(self._drawn):
            ahead = self._agreed(self._next, self._asked.round + 1)
        said = {site: as_plain(replace(collector.ask(site), ahead=ahead)) for site in alive}
        answers = {reply.site: got for reply, got in self._answers(said, "unmask", Unmasked)}
        outboxes = {site: got.ahead for site, got in answers.items() if got.ahead is not None}
        if ahead is not None and _complete(ahead, outboxes):
            self.ahead = Ahead(ahead, outboxes)
        return {site: got.revealed for site, got in answers.items()}

    def _mean(self, total: Any, shapes: Shapes, controls: Shapes, scale: Scale) -> Combined:
        weigh = WEIGHTINGS[self._terms.study.federation.weighting]
        weights = sum(weigh(reply.n_cases) for reply in self.replies)
        sites = len(self.replies)
        delta, control = from_words(total, shapes, controls, weights, sites, scale)
        return Combined(delta, control, sites)

    def _answers(
        self, said: Mapping[str, Mapping[str, Any]], kind: Any, form: type[T]
    ) -> Iterator[tuple[Reply, T]]:
        """Each sound answer to a step around the round; who gives none is noted, not fatal."""
        bare = replace(self._asked, kind=kind, weights={}, control={}, shared={}, parts=())
        bare = replace(bare, model="", best_round=0)
        asked = {site: replace(bare, secure=plain) for site, plain in said.items()}
        for reply in self._terms.ask(asked):
            answer = _read(reply, form)
            if answer is not None:
                yield reply, answer
            elif kind == "unmask":
                # Its update is in the sum, and others' shares are enough.
                log.warning("round=%d site=%s gave no shares", self._asked.round, reply.site)
            else:
                self._leave_out(reply.site, reply.refusal or "malformed answer")

    def _shapes(self) -> tuple[Shapes, Shapes]:
        asked, travels = self._asked, self._terms.travels
        return (
            {n: a.shape for n, a in asked.weights.items() if n in travels},
            {n: a.shape for n, a in asked.control.items() if n in travels},
        )

    def _leave_out(self, site: str, why: str) -> None:
        self.left_out[site] = why
        log.warning("round=%d site=%s left out: %s", self._asked.round, site, why)


def _complete(agreement: Agreement, outboxes: Mapping[str, Outbox]) -> bool:
    sites = set(agreement.sites)
    return outboxes.keys() == sites and all(o.shares.keys() == sites for o in outboxes.values())


def _read(reply: Reply, form: type[T]) -> T | None:
    try:
        return None if reply.refusal else from_plain(reply.secure, form)
    except FederationError:
        return None


def _fault_of(update: Reply, announced: int) -> str | None:
    """What can still be seen of a masked update."""
    if not is_case_count(update.n_cases):
        return "case count out of range"
    if update.n_cases > announced:
        return "more cases than announced"
    return (
        None if len(update.delta) == 1 and not update.control else "masked update of another form"
    )
