"""The coordinator's work: prepare, rounds, finish. It knows no transport and no patient.

prepare  every site -> statistics            -> Shared (label counts, means, levels)
round r  weights -> site: metrics of them, then its delta -> admitted -> combined -> new weights
finish   kept weights -> site: metrics on validation and test parts
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from medfl.common import statistics, tensors
from medfl.common.errors import FederationError
from medfl.common.messages import Instruction, Part, Reply
from medfl.common.metrics import better, mean_over_sites
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.records import columns
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors
from medfl.strategies.admission import fault_of
from medfl.strategies.catalogue import WEIGHTINGS, strategy_for
from medfl.strategies.home import home_names
from medfl.strategies.strategy import Combined, ServerState, Strategy

log = logging.getLogger(__name__)


class Sites(Protocol):
    """The hospitals as the coordinator reaches them."""

    def names(self) -> list[str]:
        """Addresses of all hospitals, in a fixed order."""

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        """Send each instruction to its address; yield the replies in the order asked."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What a person may see of one round. Metrics are those of the model that the round received.

    metrics: mean over the sites. sites: one plain record a site. left_out: site -> why.
    void: too few updates; the model did not change.
    """

    run: str
    round: int
    seconds: float
    metrics: dict[str, float | None]
    loss: float | None
    sites: list[dict[str, Any]]
    left_out: dict[str, str]
    void: bool
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run: the kept weights, the last ones, and the sites' final replies."""

    weights: Tensors
    last: Tensors
    selected_round: int
    shared: Shared
    final: tuple[Reply, ...]
    records: tuple[RoundRecord, ...]
    seconds: float
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Best:
    """The best model so far by the study's rule."""

    metric: str | None
    round: int = 0
    value: float | None = None
    weights: Tensors = field(default_factory=dict)

    def offer(self, round_: int, metrics: dict[str, float | None], weights: Tensors) -> None:
        value = None if self.metric is None else metrics.get(self.metric)
        if value is None:
            return
        sign = 1 if self.metric is not None and better(self.metric) == "higher" else -1
        if self.value is None or sign * value > sign * self.value:
            self.round, self.value, self.weights = round_, value, weights


def run_study(
    study: Study,
    sites: Sites,
    *,
    seed: int,
    run: str = "main",
    on_round: Callable[[RoundRecord, Tensors], None] = lambda record, weights: None,
) -> Outcome:
    """Train one study with these sites; the same seed and sites give the same weights, bit by bit.

    Raises:
        ConfigError: the study names what the catalogues do not have.
        FederationError: fewer sites than federation.min_sites take part, or no round had enough.
    """
    started = time.monotonic()
    strategy = strategy_for(study)
    say = Instruction(kind="prepare", study_digest=study.digest, run=run, seed=seed)
    names, shared, refused = _prepare(study, sites, say)
    _refuse_unseen_choice(study, shared)
    weights: Tensors = initial_weights(study, shared, seed)
    say = replace(say, shared=statistics.statistics_to_plain(shared))
    state, best, records = ServerState(), _Best(study.federation.best_metric), []
    control: dict[str, Array] = {}
    if strategy.local.control_variates:
        control = {n: np.zeros_like(a) for n, a in tensors.floats(weights).items()}
    for number in range(1, study.federation.rounds + 1):
        asked = replace(
            say,
            kind="round",
            round=number,
            best_round=best.round,
            parts=("validation",),
            weights=weights,
            control=control,
        )
        drawn = draw(names, study.federation.sites_per_round, derive(seed, "draw", number))
        record, combined = _round(study, strategy, sites, drawn, asked)
        best.offer(number - 1, record.metrics, weights)
        records.append(record)
        if not record.void:
            weights, state = strategy.server_step(weights, combined.delta, state)
            share = combined.n_sites / len(names)
            control = {
                n: (c + share * combined.control[n]).astype(c.dtype) if n in combined.control else c
                for n, c in control.items()
            }
        on_round(record, weights)
    if all(record.void for record in records):
        raise FederationError(
            f"None of {len(records)} rounds had the {study.federation.min_sites} sites that the "
            f"study asks for. Left out last: {_names(records[-1].left_out)}."
        )
    last = weights
    if best.metric is not None:
        record = _evaluate_last(
            sites,
            names,
            replace(
                say,
                kind="finish",
                round=study.federation.rounds,
                parts=("validation",),
                weights=last,
            ),
        )
        best.offer(study.federation.rounds, record.metrics, last)
        records.append(record)
        on_round(record, last)
    kept = best.round if study.federation.keep == "best" else study.federation.rounds
    weights = best.weights if study.federation.keep == "best" else last
    final = tuple(
        _finish(
            sites,
            names,
            replace(
                say,
                kind="finish",
                round=kept,
                best_round=best.round,
                parts=("validation", "test"),
                weights=weights,
            ),
        )
    )
    return Outcome(
        weights=weights,
        last=last,
        selected_round=kept,
        shared=shared,
        final=final,
        records=tuple(records),
        seconds=time.monotonic() - started,
        refused=refused,
    )


def _refuse_unseen_choice(study: Study, shared: Shared) -> None:
    """A best round cannot be chosen by metrics that private hospitals keep to themselves.

    Raises:
        FederationError: with what to change.
    """
    priced = study.privacy is not None and study.privacy.metrics_epsilon is not None
    if study.federation.best_metric is not None and shared.private and not priced:
        raise FederationError(
            "federation.best_metric: a hospital trains under differential privacy and reports no "
            'metrics. Remove it and write keep = "last", or write a [privacy] table that states '
            "what metrics may cost (metrics_epsilon)."
        )


def _travelling(study: Study, strategy: Strategy, asked: Instruction) -> list[str]:
    """Names of the parameters that sites send."""
    shared = statistics.shared_from_plain(asked.shared)
    n_features = len(columns(study.record, shared)) if study.record is not None else None
    model = build_model(study, shared, n_features=n_features, seed=0)
    stays = home_names(model, strategy.local)
    return [name for name in tensors.floats(asked.weights) if name not in stays]


def initial_weights(study: Study, shared: Shared, seed: int) -> dict[str, Array]:
    """The weights that round 1 starts from."""
    n_features = len(columns(study.record, shared)) if study.record is not None else None
    model = build_model(study, shared, n_features=n_features, seed=derive(seed, "weights"))
    return get_weights(model)


def draw(names: list[str], n: int | None, seed: int) -> list[str]:
    """`n` of the sites without replacement, in their fixed order; all where n is None."""
    if n is None or n >= len(names):
        return names
    chosen = np.random.default_rng(seed).choice(len(names), size=n, replace=False)
    return [names[i] for i in sorted(chosen)]


def _prepare(
    study: Study, sites: Sites, say: Instruction
) -> tuple[list[str], Shared, dict[str, str]]:
    """Addresses that take part, in order of site name, what they share, and who refused why."""
    addresses = sites.names()
    found, parts, refused = {}, {}, {}
    for address, reply in zip(addresses, sites.ask((a, say) for a in addresses), strict=True):
        if reply.refusal:
            refused[reply.site] = reply.refusal
            log.warning("site=%s takes no part: %s", reply.site, reply.refusal)
        else:
            found[reply.site] = address
            parts[reply.site] = statistics.local_from_plain(reply.statistics)
    if len(found) < max(1, study.federation.min_sites):
        raise FederationError(
            f"{len(found)} of {len(addresses)} sites can take part; the study needs "
            f"{study.federation.min_sites}. Left out: {_names(refused)}. "
            "Run `medfl-client check` at each of them."
        )
    ordered = sorted(found)
    return [found[n] for n in ordered], statistics.merge(parts[n] for n in ordered), refused


def _round(
    study: Study, strategy: Strategy, sites: Sites, names: list[str], asked: Instruction
) -> tuple[RoundRecord, Combined]:
    started = time.monotonic()
    replies: list[Reply] = []
    left_out: dict[str, str] = {}
    bytes_up = 0
    travels = _travelling(study, strategy, asked)

    def admitted() -> Iterator[Reply]:
        nonlocal bytes_up
        for reply in sites.ask((name, asked) for name in names):
            bytes_up += _size(reply.delta) + _size(reply.control)
            fault = fault_of(reply, asked, travels)
            if fault is None:
                replies.append(replace(reply, delta={}, control={}))
                yield reply
            else:
                left_out[reply.site] = fault
                log.warning("round=%d site=%s left out: %s", asked.round, reply.site, fault)

    combined = strategy.combine(admitted(), WEIGHTINGS[study.federation.weighting])
    record = _record(asked, replies, left_out, time.monotonic() - started)
    return replace(
        record,
        void=len(replies) < study.federation.min_sites,
        bytes_up=bytes_up,
        bytes_down=len(names) * (_size(asked.weights) + _size(asked.control)),
    ), combined


def _evaluate_last(sites: Sites, names: list[str], asked: Instruction) -> RoundRecord:
    """The last model's validation, which no later round reports, as a record of its own."""
    started = time.monotonic()
    replies = list(sites.ask((name, asked) for name in names))
    good = [r for r in replies if not r.refusal]
    left_out = {r.site: r.refusal for r in replies if r.refusal}
    record = _record(asked, good, left_out, time.monotonic() - started)
    return replace(record, round=asked.round + 1)


def _finish(sites: Sites, names: list[str], asked: Instruction) -> Iterator[Reply]:
    for reply in sites.ask((name, asked) for name in names):
        if reply.refusal:
            log.warning("finish: site=%s left out: %s", reply.site, reply.refusal)
        else:
            yield reply


def _record(
    asked: Instruction, replies: list[Reply], left_out: dict[str, str], seconds: float
) -> RoundRecord:
    part: Part = "validation"
    losses = [(r.loss, r.n_cases) for r in replies if r.loss is not None]
    cases = sum(n for _, n in losses)
    return RoundRecord(
        run=asked.run,
        round=asked.round,
        seconds=seconds,
        metrics=mean_over_sites([r.metrics.get(part, {}) for r in replies]),
        loss=sum(loss * n for loss, n in losses) / cases if cases else None,
        sites=[
            {
                "name": r.site,
                "metrics": dict(r.metrics.get(part, {})),
                "loss": r.loss,
                "epsilon": r.epsilon,
                "seconds": r.seconds,
                "steps": r.steps,
            }
            for r in replies
        ],
        left_out=left_out,
        void=False,
        bytes_down=0,
        bytes_up=0,
    )


def _size(group: Tensors) -> int:
    return sum(a.nbytes for a in group.values())


def _names(left_out: dict[str, str]) -> str:
    return ", ".join(f"{site} ({why})" for site, why in sorted(left_out.items())) or "nobody"
