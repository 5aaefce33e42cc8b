"""The metrics by name, how a task chooses among them, and what they say about a site.

Undefined values (a site with one class has no AUROC) are None, never nan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import ConfigError
from medfl.common.metrics import resampled
from medfl.common.metrics.resampled import Drawn
from medfl.common.metrics.scores import (
    DICE,
    EMPTY,
    HD95,
    SURFACE,
    Scores,
    concatenate,
    load,
    score_classification,
    score_masks,
)
from medfl.common.study import Task

__all__ = [
    "METRICS",
    "OF_CLASSES",
    "Metric",
    "Scores",
    "better",
    "concatenate",
    "default_metrics",
    "intervals",
    "known_metrics",
    "load",
    "mean_over_sites",
    "needs_distances",
    "score_classification",
    "score_masks",
    "summarise",
]

log = logging.getLogger(__name__)

Better = Literal["higher", "lower"]
Resampled = Callable[[Drawn], NDArray[np.float64]]

# Shares of the cases of single classes, or made of them: over one healthy patient, specificity says
# what was said of this patient.
OF_CLASSES = frozenset(
    "recall specificity precision f1 balanced_accuracy auroc average_precision".split()
)

# Cases x resamples handled at once, so that a large site's bootstrap stays below some 100 MB.
_CELLS = 2_000_000


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    resampled: of the cases as they were drawn -> (R,), nan where undefined.
    masks: compares masks, and exists for every foreground class too (`dice_<class>`).
    """

    resampled: Resampled
    better: Better = "higher"
    masks: bool = False


def _of_masks(measure: str, only: str | None = None) -> Resampled:
    """Mean over the cases, then over the foreground classes or of the one named."""

    def resample(drawn: Drawn) -> NDArray[np.float64]:
        found = drawn.scores.columns
        names = [f"{measure}/{n}" for n in ([only] if only else drawn.task.classes[1:])]
        columns = [found[name] for name in names if name in found]
        if not columns:
            return np.full(len(drawn.weights), np.nan)
        means = [resampled.mean_of_defined(column, drawn.weights) for column in columns]
        return resampled.mean_defined(np.stack(means, axis=1))

    return resample


METRICS: dict[str, Metric] = {
    "accuracy": Metric(resampled.accuracy),
    "balanced_accuracy": Metric(resampled.balanced_accuracy),
    "auroc": Metric(resampled.auroc),
    "average_precision": Metric(resampled.average_precision),
    "recall": Metric(resampled.recall),
    "specificity": Metric(resampled.specificity),
    "precision": Metric(resampled.precision),
    "f1": Metric(resampled.f1),
    "brier": Metric(resampled.brier, "lower"),
    "ece": Metric(resampled.ece, "lower"),
    DICE: Metric(_of_masks(DICE), masks=True),
    HD95: Metric(_of_masks(HD95), "lower", masks=True),
    SURFACE: Metric(_of_masks(SURFACE), "lower", masks=True),
    EMPTY: Metric(_of_masks(EMPTY), "lower", masks=True),
}


def known_metrics(task: Task) -> tuple[str, ...]:
    """Every name that `summarise` takes for this task."""
    masks = task.kind == "segmentation"
    names = [name for name, metric in METRICS.items() if metric.masks == masks]
    return (*names, *(f"{n}_{c}" for n in names for c in task.classes[1:] if masks))


def default_metrics(task: Task) -> tuple[str, ...]:
    """What is reported where the study names no metrics."""
    if task.kind == "segmentation":
        return (DICE, HD95, SURFACE, EMPTY, *(f"{DICE}_{name}" for name in task.classes[1:]))
    return known_metrics(task)


def needs_distances(names: Iterable[str]) -> bool:
    """Whether `score_masks` must compute the (slow) distances for these metrics."""
    return any(name.startswith((HD95, SURFACE)) for name in names)


def better(name: str) -> Better:
    """Whether more of a metric is better or less. Raises ConfigError for an unknown name."""
    for known, metric in METRICS.items():
        if name == known or (metric.masks and name.startswith(f"{known}_")):
            return metric.better
    raise ConfigError(f"metric {name!r} is not known; use one of {', '.join(METRICS)}")


def summarise(task: Task, scores: Scores, names: Iterable[str]) -> dict[str, float | None]:
    """Value of each named metric; None where undefined.

    Raises:
        ConfigError: with every name that this task does not have.
    """
    metrics = _metrics(task, names)
    if not _usable(task, scores):
        return dict.fromkeys(metrics)
    once = Drawn(task, scores, np.ones((1, len(scores))))
    values = {name: float(metric.resampled(once)[0]) for name, metric in metrics.items()}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def intervals(
    task: Task,
    scores: Scores,
    names: Iterable[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
    values: Mapping[str, float | None] | None = None,
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13) over patients.

    Patients are drawn with replacement, each with all cases, because one patient's images are not
    independent. Resamples in which a metric is undefined are left out; None where they are half
    or more, where the metric itself is undefined, or with fewer than two patients.

    values: of the names, where they were summarised already.

    Raises:
        ConfigError: with every name that this task does not have.
    """
    values = summarise(task, scores, names) if values is None else values
    metrics = {n: m for n, m in _metrics(task, values).items() if values[n] is not None}
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(values)
    if resamples < 1 or len(set(scores.patients)) < 2 or not metrics:
        return found
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    for weights in _draws(scores.patients, resamples, seed):
        block = Drawn(task, scores, weights)
        for name, metric in metrics.items():
            drawn[name].append(metric.resampled(block))
    return found | {name: _percentiles(parts, level) for name, parts in drawn.items()}


def mean_over_sites(
    summaries: Sequence[Mapping[str, float | None]],
) -> dict[str, float | None]:
    """Plain mean of each metric over the sites that have it; None where none has."""
    names = dict.fromkeys(name for summary in summaries for name in summary)
    means: dict[str, float | None] = {}
    for name in names:
        values = [v for summary in summaries if (v := summary.get(name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def _metrics(task: Task, names: Iterable[str]) -> dict[str, Metric]:
    known = known_metrics(task)
    names = list(names)
    faults = [
        f"metric {name!r}: a {task.kind} does not have it; use one of {', '.join(known)}"
        for name in names
        if name not in known
    ]
    if faults:
        raise ConfigError(faults)
    return {name: _metric(name) for name in names}


def _metric(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    measure = next(n for n, m in METRICS.items() if m.masks and name.startswith(f"{n}_"))
    one = _of_masks(measure, only=name.removeprefix(f"{measure}_"))
    return Metric(one, METRICS[measure].better, masks=True)


def _usable(task: Task, scores: Scores) -> bool:
    """Whether there is anything to measure, and it is numbers; masks' scores may be undefined."""
    if task.kind == "segmentation":
        return True
    broken = int(np.sum(~np.isfinite(scores.columns["probability"]).all(axis=1)))
    if broken:
        log.warning("cases_without_finite_probability=%d of=%d", broken, len(scores))
    return not broken and len(scores) > 0


def _draws(patients: Sequence[str], resamples: int, seed: int) -> Iterable[NDArray[np.float64]]:
    """Weights (R, N) of the cases, in blocks of R: how often each case's patient was drawn."""
    unique, patient_of = np.unique(np.array(patients), return_inverse=True)
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // len(patients))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        # Drawn one by one and counted: the same law as a multinomial's, in a tenth of its time.
        drawn = generator.integers(len(unique), size=(size, len(unique)))
        drawn += np.arange(size)[:, None] * len(unique)
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield times[:, patient_of].astype(np.float64)


def _percentiles(parts: Sequence[NDArray[np.float64]], level: float) -> tuple[float, float] | None:
    values = np.concatenate(parts)
    defined = values[~np.isnan(values)]
    if 2 * len(defined) <= len(values):
        return None
    # numpy.quantile's own rule; a call of it takes ten times as long for a thousand numbers.
    places = (len(defined) - 1) * np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = np.interp(places, np.arange(len(defined)), np.sort(defined))
    return float(low), float(high)
