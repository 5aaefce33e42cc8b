"""A finished run's folder, read into frozen values; nothing here draws or words anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medfl.common import study_text
from medfl.common.errors import StorageError
from medfl.common.study import Study, load_study

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class SiteResult:
    """One hospital's outcome under one way of training.

    metrics: on its test cases; None where it is undefined there (one class only, no cases).
    intervals: 95 % by resampling patients. epsilon, delta: None without differential privacy.
    quarantined: cases left out, by reason. n_*: None where it did not say. smallest_class: test
    cases of its rarest class; None where that is not known.
    """

    name: str
    n_train: int | None
    n_validation: int | None
    n_test: int | None
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Interval | None]
    epsilon: float | None
    delta: float | None
    quarantined: Mapping[str, int]
    smallest_class: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way of training. mean: over sites; pooled: over all test cases of all sites as one.

    elsewhere: of models that hospitals trained alone, by whose model and whose test cases.
    """

    sites: tuple[SiteResult, ...]
    mean: Mapping[str, float | None]
    pooled: Mapping[str, float | None]
    pooled_intervals: Mapping[str, Interval | None]
    elsewhere: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Round:
    """One line of rounds.jsonl; the metrics are those of the model *received* in this round.

    The loss is that of training in this round. run: "main" or a baseline's name. site_*: by site
    name. left_out: why, by site. void: too few answers, so the model stayed as it was.
    epsilon: of a hospital by [site_privacy]; None without it. site_length, site_cosine: of each
    admitted update, where the coordinator sees single ones (`medfl.strategies.direction`).
    trained: False of a line after the last round, which judges a model. answered: seconds from a
    hospital's question to its answer; site_seconds: of these its own work, as it told.
    """

    run: str
    number: int
    metrics: Mapping[str, float | None]
    loss: float | None
    site_metrics: Mapping[str, Mapping[str, float | None]]
    site_loss: Mapping[str, float | None]
    site_epsilon: Mapping[str, float | None]
    left_out: Mapping[str, str]
    void: bool
    epsilon: float | None = None
    site_length: Mapping[str, float | None] = field(default_factory=dict)
    site_cosine: Mapping[str, float | None] = field(default_factory=dict)
    trained: bool = True
    answered: Mapping[str, float | None] = field(default_factory=dict)
    site_seconds: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the report is made from; `facts` is result.json as it is.

    external: hospitals that only evaluated; they are in no mean and in no figure over all cases.
    """

    folder: Path
    study: Study
    facts: Mapping[str, Any]
    federated: Outcome
    baselines: Mapping[str, Outcome]
    rounds: tuple[Round, ...]
    external: tuple[SiteResult, ...] = ()

    @property
    def between_hospitals(self) -> bool:
        """Whether separate hospitals took part, who kept the scores of their cases."""
        return self.facts.get("kind") == "federation"

    @property
    def private_sites(self) -> tuple[SiteResult, ...]:
        """The hospitals that trained under differential privacy."""
        return tuple(s for s in self.federated.sites if s.epsilon is not None)

    @property
    def epsilons(self) -> dict[str, float]:
        """What each hospital's training spent, also of those that did not answer at the end."""
        last = {
            name: epsilon
            for line in self.rounds
            for name, epsilon in line.site_epsilon.items()
            if line.run == "main" and epsilon is not None
        }
        own = {s.name: s.epsilon for s in self.private_sites if s.epsilon is not None}
        return {**last, **own}

    @property
    def chosen_by_metric(self) -> bool:
        """Whether the published round was in fact chosen by a metric on validation cases."""
        how = self.study.federation
        return how.keep == "best" and any(
            r.metrics.get(how.best_metric or "") is not None for r in self.rounds if r.run == "main"
        )

    @property
    def site_epsilon(self) -> float | None:
        """What the run's models tell of a whole hospital at most; None without [site_privacy]."""
        return max((r.epsilon for r in self.rounds if r.epsilon is not None), default=None)


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        StorageError: a file is missing, is not whole, or lacks what the report needs.
        ConfigError: study.toml has faults.
    """
    facts = _json_object(_text(folder / "result.json"), folder / "result.json")
    study = _study(folder)
    try:
        federated = _outcome(facts)
        baselines = {name: _outcome(part) for name, part in (facts.get("baselines") or {}).items()}
        rounds = tuple(_rounds(folder / "rounds.jsonl"))
        external = tuple(_site(s) for s in facts.get("external") or [])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{folder}: result.json or rounds.jsonl lacks something that the report needs "
            f"({type(error).__name__}: {error}). Was the run finished by this version of medfl?"
        ) from None
    return Run(folder, study, facts, federated, baselines, rounds, external)


def _study(folder: Path) -> Study:
    """As a person wrote it, or as the coordinator published it."""
    published = folder / "study.json"
    if published.exists():
        return study_text.from_text(_text(published))
    return load_study(folder / "study.toml")


def arrays_path(run: Run, way: str | None, site: str, name: str) -> Path | None:
    """Where a site's scores or examples lie; None if absent or the site's name is no plain name.

    way: None for the federated model, else a baseline's name.
    """
    if any(Path(part).name != part for part in (site, way or "main")):
        return None
    base = run.folder if way is None else run.folder / "baselines" / way
    path = base / "sites" / site / name
    return path if path.is_file() else None


def _outcome(plain: Mapping[str, Any]) -> Outcome:
    return Outcome(
        sites=tuple(_site(s) for s in plain["sites"]),
        mean=_numbers(plain.get("mean")),
        pooled=_numbers(plain.get("all")),
        pooled_intervals=_intervals(plain.get("all_intervals")),
        elsewhere={
            str(whose): {str(where): _numbers(found) for where, found in tested.items()}
            for whose, tested in (plain.get("elsewhere") or {}).items()
        },
    )


def _site(plain: Mapping[str, Any]) -> SiteResult:
    return SiteResult(
        name=str(plain["name"]),
        n_train=_whole(plain.get("n_train")),
        n_validation=_whole(plain.get("n_validation")),
        n_test=_whole(plain.get("n_test")),
        metrics=_numbers(plain.get("metrics")),
        intervals=_intervals(plain.get("intervals")),
        epsilon=_number(plain.get("epsilon")),
        delta=_number(plain.get("delta")),
        quarantined={str(k): int(v) for k, v in (plain.get("quarantined") or {}).items()},
        smallest_class=_whole(plain.get("smallest_class")),
    )


def _rounds(path: Path) -> Iterator[Round]:
    for line in _text(path).splitlines() if path.exists() else []:
        if not line.strip():
            continue
        plain = _json_object(line, path)
        sites = plain.get("sites") or []
        yield Round(
            run=str(plain.get("run", "main")),
            number=int(plain["round"]),
            metrics=_numbers(plain.get("metrics")),
            loss=_number(plain.get("loss")),
            site_metrics={s["name"]: _numbers(s.get("metrics")) for s in sites},
            site_loss={s["name"]: _number(s.get("loss")) for s in sites},
            site_epsilon={s["name"]: _number(s.get("epsilon")) for s in sites},
            site_length={s["name"]: _number(s.get("length")) for s in sites},
            site_cosine={s["name"]: _number(s.get("cosine")) for s in sites},
            left_out={str(k): str(v) for k, v in (plain.get("left_out") or {}).items()},
            void=bool(plain.get("void", False)),
            epsilon=_number(plain.get("epsilon")),
            trained=bool(plain.get("trained", True)),
            answered=_numbers(plain.get("answered")),
            site_seconds={s["name"]: _number(s.get("seconds")) for s in sites},
        )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _number(value: Any) -> float | None:
    """A finite number or None; JSON writers put NaN where a metric is undefined."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def _numbers(plain: Mapping[str, Any] | None) -> dict[str, float | None]:
    return {str(name): _number(value) for name, value in (plain or {}).items()}


def _intervals(plain: Mapping[str, Any] | None) -> dict[str, Interval | None]:
    found: dict[str, Interval | None] = {}
    for name, pair in (plain or {}).items():
        low, high = (_number(pair[0]), _number(pair[1])) if pair else (None, None)
        found[str(name)] = None if low is None or high is None else (low, high)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StorageError(
            f"{path}: there is no such file; name the folder of a finished run"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: could not be read ({error})") from None


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise StorageError(f"{path}: is not whole JSON ({error}); run the study again") from None
    if not isinstance(plain, dict):
        raise StorageError(f"{path}: must hold a JSON object; run the study again")
    return plain
