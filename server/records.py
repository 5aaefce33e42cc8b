"""What the coordinator remembers of a round for people, and which model was the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from medfl.common.messages import Instruction, Reply
from medfl.common.metrics import better, mean_over_sites
from medfl.common.tensors import Tensors
from medfl.strategies.direction import Direction


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What a person may see of one round. Metrics are those of the model that the round received.

    metrics: mean over the sites. sites: one plain record a site, with length and direction of its
    update where it was seen (`medfl.strategies.direction`). left_out: site -> why.
    void: too few updates; the model did not change. model: digest of the weights after the round.
    epsilon: of a hospital by the study's [site_privacy], after this round; None without it.
    trained: False where a model was judged and none trained: after the last round.
    answered: site -> seconds from its question to the whole answer, or until it was given up; of
        hospitals that are asked over a network.
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
    model: str = ""
    epsilon: float | None = None
    trained: bool = True
    answered: dict[str, float] = field(default_factory=dict)


def bytes_per_round(rounds: Sequence[RoundRecord]) -> tuple[int, int]:
    """Mean bytes of arrays up and down in a round with training, all hospitals together."""
    trained = [r for r in rounds if r.bytes_up]
    up, down = sum(r.bytes_up for r in trained), sum(r.bytes_down for r in trained)
    n = max(1, len(trained))
    return round(up / n), round(down / n)


@dataclass(frozen=True, slots=True)
class Best:
    """The best model so far by the study's rule; nothing yet where `value` is None.

    sites: the metric of each hospital that had it, on its validation cases. value: their mean.
    no_better: later models in a row that were compared with it and are no better.
    """

    metric: str | None
    round: int = 0
    value: float | None = None
    weights: Tensors = field(default_factory=dict)
    sites: Mapping[str, float] = field(default_factory=dict)
    no_better: int = 0

    def or_this(self, round_: int, sites: Sequence[Mapping[str, Any]], weights: Tensors) -> Best:
        """The better of the two; the earlier one where they are equal.

        Compared are means over the hospitals that both rounds have the metric of. Where these are
        not more than half of the best round's, the two cannot be compared and the best one stays.

        sites: as in `RoundRecord.sites`.
        """
        if self.metric is None:
            return self
        told = {str(site["name"]): site["metrics"].get(self.metric) for site in sites}
        own = {name: float(value) for name, value in told.items() if value is not None}
        if not own:
            return self
        if self.value is not None:
            both = sorted(own.keys() & self.sites.keys())
            sign = 1 if better(self.metric) == "higher" else -1
            gained = sign * (sum(own[n] for n in both) - sum(self.sites[n] for n in both))
            if 2 * len(both) <= len(self.sites):
                return self
            if gained <= 0:
                return replace(self, no_better=self.no_better + 1)
        return Best(self.metric, round_, sum(own.values()) / len(own), weights, own)


def round_record(
    asked: Instruction,
    replies: Sequence[Reply],
    left_out: dict[str, str],
    *,
    seconds: float,
    void: bool = False,
    bytes_up: int = 0,
    directions: Mapping[str, Direction] | None = None,
    trained: bool = True,
    answered: Mapping[str, float] | None = None,
) -> RoundRecord:
    """The record of one round from the admitted replies (their arrays are not looked at)."""
    losses = [(r.loss, r.n_cases) for r in replies if r.loss is not None]
    cases = sum(n for _, n in losses)
    n_asked = len(replies) + len(left_out)
    return RoundRecord(
        run=asked.run,
        round=asked.round,
        seconds=seconds,
        metrics=mean_over_sites([r.metrics.get("validation", {}) for r in replies]),
        loss=sum(loss * n for loss, n in losses) / cases if cases else None,
        sites=[_site(reply, (directions or {}).get(reply.site)) for reply in replies],
        left_out=left_out,
        void=void,
        bytes_down=n_asked * (size(asked.weights) + size(asked.control)),
        bytes_up=bytes_up,
        trained=trained,
        answered={r.site: r.answered for r in replies if r.answered is not None}
        | dict(answered or {}),
    )


def slowest(record: RoundRecord) -> str:
    """Who was waited for longest, and how long; "" where that is not known, or of one alone."""
    if len(record.answered) < 2:
        return ""
    site, seconds = max(record.answered.items(), key=lambda item: (item[1], item[0]))
    own = {str(s["name"]): float(s.get("seconds") or 0.0) for s in record.sites}.get(site, 0.0)
    work = f", of which {own:.1f} s its own work" if own >= 0.05 else ""
    return f"longest waited for {site}: {seconds:.1f} s{work}"


def finite(plain: Any) -> Any:
    """The same plain values for JSON, None where a number is not finite: nothing was measured."""
    if isinstance(plain, Mapping):
        return {key: finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def size(group: Tensors) -> int:
    """Bytes of these arrays."""
    return sum(a.nbytes for a in group.values())


def named(left_out: Mapping[str, str]) -> str:
    """Sites and reasons in one line."""
    return ", ".join(f"{site} ({why})" for site, why in sorted(left_out.items())) or "nobody"


def _site(reply: Reply, direction: Direction | None) -> dict[str, Any]:
    return {
        "name": reply.site,
        "metrics": dict(reply.metrics.get("validation", {})),
        "loss": reply.loss,
        "epsilon": reply.epsilon,
        "delta": reply.target_delta,
        "seconds": reply.seconds,
        "steps": reply.steps,
        **({} if direction is None else asdict(direction)),
    }
