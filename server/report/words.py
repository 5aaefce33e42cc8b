"""Numbers and names as people read them: the one place that decides decimals and masking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from medfl.common.errors import ConfigError
from medfl.common.metrics import OF_CLASSES, better
from medfl.server.report.run import Interval, Outcome, Run, SiteResult

# Below this, a count could point at single patients.
SMALL = 5
NONE = "–"


@dataclass(frozen=True, slots=True)
class Measure:
    """How a metric is written. larger_is_better decides which site is best and who gained."""

    label: str
    larger_is_better: bool = True
    decimals: int = 3


LABELS = {
    "dice": "Dice",
    "hd95": "95 % Hausdorff distance",
    "surface_distance": "Surface distance",
    "empty_false_positives": "False positives on empty masks",
    "auroc": "AUROC",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "Calibration error",
    "recall": "Recall (sensitivity)",
    "precision": "Precision",
}
DISTANCES = ("hd95", "surface_distance")
# What the headline speaks of, first one present.
HEADLINE = {
    "segmentation": ("dice",),
    "classification": ("auroc", "balanced_accuracy", "accuracy"),
    "risk": ("auroc", "accuracy"),
}


def measure(name: str) -> Measure:
    """How to write a metric; `dice_liver` is Dice for the liver; unknown ones keep their name."""
    try:
        larger = better(name) == "higher"
    except ConfigError:
        larger = True
    for base in ("dice", "empty_false_positives", *DISTANCES):
        if name.startswith(f"{base}_"):
            part = name.removeprefix(f"{base}_")
            return Measure(f"{LABELS[base]}, {part}", larger, 2 if base in DISTANCES else 3)
    plain = name.replace("_", " ")
    label = LABELS.get(name, plain[:1].upper() + plain[1:])
    return Measure(label, larger, 2 if name in DISTANCES else 3)


def headline_metric(run: Run) -> str | None:
    """The metric of summary, cards and figures: the study's own choice, else the task's."""
    either = (*run.federated.pooled.items(), *run.federated.mean.items())
    known = list(dict.fromkeys(name for name, number in either if number is not None))
    wished = (
        *([run.study.federation.best_metric] if run.study.federation.best_metric else []),
        *(run.study.evaluation.metrics or ()),
        *HEADLINE[run.study.task.kind],
        *known,
    )
    return next((name for name in wished if name in known), None)


def value(name: str, number: float | None) -> str:
    """A metric's value with its decimals, or a dash."""
    return NONE if number is None else f"{number:.{measure(name).decimals}f}"


def interval(name: str, pair: Interval | None) -> str:
    """`0.842–0.881`, or nothing."""
    return "" if pair is None else f"{value(name, pair[0])}–{value(name, pair[1])}"


def count(n: int | None) -> str:
    """A count with small ones masked: 0, <5, 17, 1,204; a dash where it was not told."""
    if n is None:
        return NONE
    return f"<{SMALL}" if 0 < n < SMALL else f"{n:,}"


def total(counts: Iterable[int | None]) -> str:
    """A sum that does not reveal a masked part: masked counts are at least 1, so "more than"."""
    numbers = list(counts)
    if all(n is None for n in numbers):
        return NONE
    visible = [n for n in numbers if n is not None and not 0 < n < SMALL]
    seen = f"{sum(visible):,}"
    if not sum(visible) and len(visible) < len(numbers):
        most = (SMALL - 1) * (len(numbers) - len(visible))
        return NONE if None in numbers else f"at most {most:,}"
    return seen if len(visible) == len(numbers) else f"more than {seen}"


def shows_metrics(site: SiteResult, name: str = "") -> bool:
    """Whether a site's own metrics are shown; 2/3 correct would give a masked count away.

    A private hospital tells no count, and metrics only with noise. name: of a metric; one that is
    a share of a class's cases is not shown where these are few (one healthy patient's specificity
    says what was said of this patient).
    """
    if site.n_test is not None and site.n_test < SMALL:
        return False
    return name not in OF_CLASSES or not 0 < (site.smallest_class or 0) < SMALL


def epsilon(number: float | None) -> str:
    """ε with two decimals, rounded up: a privacy loss is never written smaller than it is."""
    if number is None:
        return NONE
    rounded = round(number, 2)
    return f"{rounded if rounded >= number - 1e-9 else rounded + 0.01:.2f}"


def small_number(number: float | None) -> str:
    """δ and its like: 1e-05."""
    return NONE if number is None else f"{number:.2g}"


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(n_bytes: float | None) -> str:
    """`240 kB`, `1.3 MB`; powers of 1000."""
    if n_bytes is None:
        return NONE
    amount, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, _ = amount / 1000, units.pop(0)
    return f"{amount:.0f} {units[0]}" if amount >= 10 else f"{amount:.1f} {units[0]}"


def way(name: str) -> str:
    """A baseline's name in a table."""
    known = {
        "local": "Each hospital alone",
        "pooled": "Pooled in one place",
        "no_privacy": "The same without privacy",
    }
    return known.get(name, name)


def over(outcome: Outcome, name: str) -> str:
    """Whose mean a metric's mean is: `2 of 3 hospitals, 45 test cases`."""
    own = [s for s in outcome.sites if s.metrics.get(name) is not None]
    tests = total(s.n_test for s in own)
    whole = f"of {len(outcome.sites)} hospitals" if len(outcome.sites) > 1 else "of 1 hospital"
    return f"{len(own)} {whole}" + ("" if tests == NONE else f", {tests} test cases")


def reason(key: str) -> str:
    """A quarantine reason's key as words."""
    return key.replace("_", " ").replace("-", " ")


def gained(name: str, ours: float | None, theirs: float | None) -> int | None:
    """1 if `ours` is better than `theirs` as written, 0 if equal, -1 if worse."""
    if ours is None or theirs is None:
        return None
    decimals = measure(name).decimals
    sign = 1 if measure(name).larger_is_better else -1
    difference = sign * (round(ours, decimals) - round(theirs, decimals))
    return (difference > 0) - (difference < 0)


def by_name(sites: Iterable[SiteResult]) -> Mapping[str, SiteResult]:
    """Sites by their name."""
    return {site.name: site for site in sites}
