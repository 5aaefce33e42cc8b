"""The coordinator's work: prepare, rounds, finish. It knows no transport and no patient.

prepare  every site -> statistics            -> Shared (label counts, means, levels)
round r  weights -> site: metrics of them, then its delta -> admitted -> combined -> new weights
finish   kept weights -> site: metrics on validation and test parts
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medfl.common import statistics, tensors
from medfl.common.errors import FederationError, TooFewUpdates
from medfl.common.messages import Instruction, Reply
from medfl.common.metrics import default_metrics
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.records import columns
from medfl.common.resting import rested
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors
from medfl.server.average import average_of, averaged, first_averaged
from medfl.server.checkpoint import Checkpoint, Model
from medfl.server.ending import Ending, Why, reason
from medfl.server.records import Best, RoundRecord, named, round_record, size
from medfl.server.roster import Latecomers, Prepared, Roster, Sites, ask, ask_each, prepare
from medfl.server.secure_round import Ahead, SecureRound, Terms
from medfl.strategies import buffers as averages
from medfl.strategies.admission import cleaned, fault_of, opened
from medfl.strategies.buffers import Buffers, buffer_names
from medfl.strategies.catalogue import WEIGHTINGS, strategy_for
from medfl.strategies.direction import Directions
from medfl.strategies.home import home_names
from medfl.strategies.proportion import OUT_OF_PROPORTION, Proportion, remember, remembered
from medfl.strategies.rehearsal import refuse_misfit
from medfl.strategies.site_privacy import spent
from medfl.strategies.strategy import Combined, ServerState, Strategy

__all__ = ["Outcome", "RoundRecord", "Sites", "draw", "run_study"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run: the kept weights, the last ones, and the sites' final replies.

    ending: of the training; None of a run that was stopped and may go on. external: of sites that
    only evaluated.
    """

    weights: Tensors
    last: Tensors
    selected_round: int
    shared: Shared
    final: tuple[Reply, ...]
    records: tuple[RoundRecord, ...]
    seconds: float
    refused: dict[str, str] = field(default_factory=dict)
    unlike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ending: Ending | None = None
    external: tuple[Reply, ...] = ()


@dataclass(frozen=True, slots=True)
class _Final:
    """Last words of sites that trained, and of those that only evaluated."""

    trained: tuple[Reply, ...]
    external: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an interrupted run has done. records: of the rounds up to the checkpoint's."""

    checkpoint: Checkpoint
    records: Sequence[RoundRecord]


@dataclass(frozen=True, slots=True)
class _Federation:
    """What stays the same over all rounds, but for hospitals that join (`prepared`).

    travels: parameters that sites send. buffers: those of them that are only averaged.
    noise_key: as in `run_study`. ahead: by round, the keys of its secure sum that the round before
        has left; lost with the process, and then made anew.
    """

    study: Study
    strategy: Strategy
    sites: Sites
    prepared: Prepared
    say: Instruction
    travels: frozenset[str]
    buffers: frozenset[str]
    noise_key: bytes | None = None
    ahead: dict[int, Ahead] = field(default_factory=dict)

    @property
    def roster(self) -> Roster:
        """Who takes part."""
        return self.prepared.roster


def run_study(
    study: Study,
    sites: Sites,
    *,
    seed: int,
    run: str = "main",
    attempt: int = 0,
    earlier: Earlier | None = None,
    noise_key: bytes | None = None,
    on_round: Callable[[RoundRecord, Tensors], None] = lambda record, weights: None,
    keep: Callable[[Checkpoint], None] = lambda checkpoint: None,
    enough: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train one study with these sites; the same seed and sites give the same weights, bit by bit.

    attempt, earlier: where an interrupted run is taken up, how often it was, and where it stood;
        it ends with the weights that it would have had, as far as sites train by the seed alone.
    keep: what each round leaves, before `on_round` tells of it.
    noise_key: of the noise of [site_privacy], for simulations; None: a fresh one, and other bits.
    enough: whether a person wants no further round; the models are judged and tested all the same.

    Raises:
        ConfigError: the study names what the catalogues do not have.
        FederationError: fewer sites than federation.min_sites take part, no round had enough, or
            the best round would be chosen by what private hospitals do not tell.
    """
    started = time.monotonic()
    say = Instruction(
        kind="prepare", study_digest=study.digest, run=run, attempt=attempt, seed=seed
    )
    late = Latecomers(study, sites)
    prepared = earlier.checkpoint.prepared if earlier else prepare(study, sites, say, late.closed)
    _refuse_unseen_choice(study, prepared.shared)
    first_question = say
    say = replace(say, shared=statistics.statistics_to_plain(prepared.shared))
    strategy = strategy_for(study, noise_key)
    model, travels, buffers = _start(study, strategy, prepared.shared, seed)
    model = earlier.checkpoint.model if earlier else model
    federation = _Federation(study, strategy, sites, prepared, say, travels, buffers, noise_key)
    records = list(earlier.records) if earlier else []
    number: int = earlier.checkpoint.record.round if earlier else 0
    why: Why = ""
    while number < study.federation.rounds:
        if number and (why := reason(study.federation, model.best, enough)):
            break
        number += 1
        if number > 1:
            prepared = late.join(prepared, first_question)
            federation = replace(federation, prepared=prepared)
        record, model = _round(federation, model, number)
        keep(Checkpoint(prepared, model, record))
        records.append(record)
        on_round(record, model.weights)
        if not prepared.shared.private:  # there a metric drowns in noise in one round or another
            _refuse_unmeasured_choice(record, model)
    if all(record.void for record in records):
        raise FederationError(
            f"None of {len(records)} rounds had the {study.federation.min_sites} sites that the "
            f"study asks for. Left out last: {named(records[-1].left_out)}."
        )
    last = model.weights
    if model.best.metric is not None:
        record, model = _judge_last(federation, model, number)
        records.append(record)
        on_round(record, last)
    kept, weights = _kept(study, model, number)
    final, record = _finish(federation, weights, kept, model.best.round)
    record = replace(record, round=number + 1)
    if model.best.metric is None:
        on_round(record, last)
    return Outcome(
        weights=weights,
        last=last,
        selected_round=kept,
        shared=prepared.shared,
        final=final.trained,
        external=final.external,
        records=tuple(records),
        seconds=time.monotonic() - started,
        refused=prepared.refused,
        unlike=prepared.unlike,
        ending=Ending(number, why),
    )


def _refuse_unseen_choice(study: Study, shared: Shared) -> None:
    priced = study.privacy is not None and study.privacy.metrics_epsilon is not None
    if study.federation.best_metric is not None and shared.private and not priced:
        raise FederationError(
            "federation.best_metric: a hospital trains under differential privacy and reports no "
            'metrics. Remove it and write keep = "last", or write a [privacy] table that states '
            "what metrics may cost (metrics_epsilon)."
        )


def _refuse_unmeasured_choice(record: RoundRecord, model: Model) -> None:
    """The cases do not change from round to round: what nobody can measure now, nobody will."""
    if model.best.metric is not None and model.best.value is None and record.sites:
        raise FederationError(
            f"federation.keep: no hospital can measure {model.best.metric} on its validation cases "
            "(they have none, or none that it is defined on), so no round can be the best. Set "
            'evaluation.validation, choose another best_metric, or write keep = "last"'
        )


def draw(names: list[str], n: int | None, seed: int) -> list[str]:
    """`n` of the sites without replacement, in their fixed order; all where n is None."""
    if n is None or n >= len(names):
        return names
    chosen = np.random.default_rng(seed).choice(len(names), size=n, replace=False)
    return [names[i] for i in sorted(chosen)]


def _start(
    study: Study, strategy: Strategy, shared: Shared, seed: int
) -> tuple[Model, frozenset[str], frozenset[str]]:
    """The model that round 1 starts from, what sites send of it, and which of that is buffers."""
    n_features = len(columns(study.record, shared)) if study.record is not None else None
    module = build_model(study, shared, n_features=n_features, seed=derive(seed, "weights"))
    refuse_misfit(study, module, strategy.local)
    weights = get_weights(module)
    floating = tensors.floats(weights)
    travels = frozenset(floating) - home_names(module, strategy.local)
    buffers = buffer_names(module) & travels
    control: dict[str, Array] = {}
    if strategy.local.control_variates:
        control = {n: np.zeros_like(a) for n, a in floating.items() if n not in buffers}
    best = Best(study.federation.best_metric)
    model = Model(weights, tensors.digest(weights), control, ServerState(), best)
    return model, travels, buffers


def _round(federation: _Federation, model: Model, number: int) -> tuple[RoundRecord, Model]:
    """One round: the model before it is judged, the model after it is returned."""
    started = time.monotonic()
    study, roster = federation.study, federation.roster
    seed = derive(federation.say.seed, "draw", number)
    drawn = draw(list(roster), study.federation.sites_per_round, seed)
    asked = replace(
        federation.say,
        kind="round",
        round=number,
        best_round=model.best.round,
        model=model.digest,
        parts=("validation",),
        weights=model.weights,
        control=model.control,
    )
    limit = study.federation.norm_limit if federation.strategy.compares else math.inf
    proportion = Proportion(remembered(model.state), limit)
    admitted: _Admitted | SecureRound
    if study.secure_aggregation is None:
        admitted = _Admitted(federation, {n: roster[n] for n in drawn}, asked, proportion)
    else:
        admitted = SecureRound(_terms(federation), drawn, asked, federation.ahead.pop(number, None))
    try:
        combined = admitted.combined()
    except TooFewUpdates as error:
        log.warning("round=%d is void: %s", number, error)
        combined = Combined({}, {}, 0)
    record = round_record(
        asked,
        admitted.replies,
        admitted.left_out,
        seconds=time.monotonic() - started,
        void=not combined.n_sites or len(admitted.replies) < study.federation.min_sites,
        bytes_up=admitted.bytes_up,
        directions=admitted.directions.found() if isinstance(admitted, _Admitted) else None,
        answered=admitted.answered if isinstance(admitted, _Admitted) else None,
    )
    best, before = model.best.or_this(number - 1, record.sites, model.weights), model.state
    if record.void and best.no_better:  # the same model is judged again in the next round
        best = replace(best, no_better=model.best.no_better)
    model = replace(model, best=best)
    if isinstance(admitted, SecureRound) and admitted.ahead is not None:
        federation.ahead[number + 1] = admitted.ahead
    model = model if record.void else _moved(federation, model, combined, admitted.buffers())
    if study.site_privacy is not None:
        record = replace(record, epsilon=spent(study, model.state.round))
    state = remember(model.state, proportion.median)
    first = first_averaged(study.federation.rounds)
    if study.federation.keep == "average" and number >= first:
        state = averaged(before, state, model.weights, number - first + 1)
    return replace(record, model=model.digest), replace(model, state=state)


def _moved(federation: _Federation, model: Model, combined: Combined, buffers: Tensors) -> Model:
    weights, state = federation.strategy.server_step(model.weights, combined.delta, model.state)
    weights = averages.moved(weights, buffers)
    # c + |S|/N * mean of the changes: Karimireddy et al. 2020, eq. 5.
    share = combined.n_sites / len(federation.roster)
    control = {
        n: (c + share * combined.control[n]).astype(c.dtype) if n in combined.control else c
        for n, c in model.control.items()
    }
    best = model.best
    if best.weights is model.weights:
        best = replace(best, weights=rested(best.weights))  # only the end asks for them
    digest = tensors.digest(weights)
    return replace(model, weights=weights, digest=digest, state=state, control=control, best=best)


class _Admitted:
    """One round's sound updates, one at a time; afterwards, what is to be told of all of them."""

    def __init__(
        self, federation: _Federation, roster: Roster, asked: Instruction, proportion: Proportion
    ) -> None:
        self._federation, self._roster, self._asked = federation, roster, asked
        self._proportion, self._buffers = proportion, Buffers(federation.buffers)
        self.directions = Directions(federation.noise_key)
        self.replies: list[Reply] = []
        self.left_out: dict[str, str] = {}
        self.answered: dict[str, float] = {}
        self.bytes_up = 0

    def combined(self) -> Combined:
        """The updates as the strategy makes one of them. Raises TooFewUpdates."""
        federation = self._federation.study.federation
        return self._federation.strategy.combine(self, WEIGHTINGS[federation.weighting])

    def buffers(self) -> Tensors:
        """The mean change of the admitted sites' buffers, once they came by."""
        strategy, weighting = self._federation.strategy, self._federation.study.federation.weighting
        return self._buffers.mean(strategy.average, WEIGHTINGS[weighting])

    def __iter__(self) -> Iterator[Reply]:
        for reply in self._proportion.admit(self._buffers.taken_off(self._sound())):
            self._buffers.admit(reply.site)
            # Not where it is to stay open whether a hospital took part at all.
            if self._federation.study.site_privacy is None:
                self.directions.note(reply.site, reply.delta)
            self.replies.append(replace(reply, delta={}, control={}))
            yield reply
            del reply  # else it would lie in memory until the next one is there
        for site in self._proportion.left_out:
            self._leave_out(site, OUT_OF_PROPORTION)

    def _sound(self) -> Iterator[Reply]:
        asked, federation = self._asked, self._federation
        for reply in _ask(federation, self._roster, asked):
            self.bytes_up += size(reply.delta) + size(reply.control)
            if reply.answered is not None:
                self.answered[reply.site] = reply.answered
            kind = federation.study.federation.updates
            update, fault = opened(reply, asked, federation.travels, kind)
            del reply  # packed; it would lie in memory beside what it was unpacked to
            if fault is None:
                announced = federation.prepared.cases[update.site]
                fault = fault_of(update, asked, federation.travels, announced)
            if fault is None:
                yield update
            else:
                self._leave_out(update.site, fault)
            del update

    def _leave_out(self, site: str, why: str) -> None:
        self.left_out[site] = why
        log.warning("round=%d site=%s left out: %s", self._asked.round, site, why)


def _ask(federation: _Federation, roster: Roster, asked: Instruction) -> Iterator[Reply]:
    """Replies that say nothing but what was asked."""
    return _only_asked(federation, ask(federation.sites, roster, asked))


def _terms(federation: _Federation) -> Terms:
    """What a round of a secure sum needs of the federation."""

    def each(asked: Mapping[str, Instruction]) -> Iterator[Reply]:
        return _only_asked(federation, ask_each(federation.sites, federation.roster, asked))

    return Terms(federation.study, federation.prepared.cases, federation.travels, each)


def _only_asked(federation: _Federation, replies: Iterator[Reply]) -> Iterator[Reply]:
    task, evaluation = federation.study.task, federation.study.evaluation
    names = frozenset(evaluation.metrics or default_metrics(task))
    return map(lambda reply: cleaned(reply, names), replies)


def _judge_last(federation: _Federation, model: Model, rounds: int) -> tuple[RoundRecord, Model]:
    """The last model's validation, which no later round reports, as a record of its own.

    rounds: that were trained.
    """
    started = time.monotonic()
    asked = replace(
        federation.say,
        kind="finish",
        round=rounds,
        model=model.digest,
        parts=("validation",),
        weights=model.weights,
    )
    replies = list(_ask(federation, federation.roster, asked))
    left_out = {r.site: r.refusal for r in replies if r.refusal}
    good = [r for r in replies if not r.refusal]
    record = round_record(asked, good, left_out, seconds=time.monotonic() - started, trained=False)
    best = model.best.or_this(rounds, record.sites, model.weights)
    return replace(record, round=rounds + 1), replace(model, best=best)


def _kept(study: Study, model: Model, rounds: int) -> tuple[int, Tensors]:
    """Which round's model is published, and its weights; of a mean, the last round.

    rounds: that were trained.
    """
    if study.federation.keep == "average":
        if rounds >= first_averaged(study.federation.rounds):
            return rounds, average_of(model.state, model.weights)
        log.warning(
            "no round of the second half was trained, of which the mean is; the last is kept"
        )
    if study.federation.keep == "best":
        if model.best.value is not None:
            return model.best.round, model.best.weights
        log.warning(
            "no site could measure %s on its validation part; the last model is kept",
            study.federation.best_metric,
        )
    return rounds, model.weights


def _finish(
    federation: _Federation, weights: Tensors, kept: int, best_round: int
) -> tuple[_Final, RoundRecord]:
    """The sites' last words, metrics of the kept model, and their validation as a record.

    Raises:
        FederationError: no site answered.
    """
    started = time.monotonic()
    asked = replace(
        federation.say,
        kind="finish",
        round=kept,
        best_round=best_round,
        model=tensors.digest(weights),
        parts=("validation", "test"),
        weights=weights,
    )
    evaluators = federation.prepared.evaluators
    replies = list(_ask(federation, {**federation.roster, **evaluators}, asked))
    left_out = {r.site: r.refusal for r in replies if r.refusal}
    for site, why in left_out.items():
        log.warning("finish: site=%s left out: %s", site, why)
    good = [r for r in replies if not r.refusal]
    trained = [r for r in good if r.site not in evaluators]
    if not trained:
        raise FederationError(f"No site could evaluate the model. Left out: {named(left_out)}.")
    seconds = time.monotonic() - started
    record = round_record(asked, trained, left_out, seconds=seconds, trained=False)
    return _Final(tuple(trained), tuple(r for r in good if r.site in evaluators)), record
