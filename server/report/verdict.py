"""The headline: the primary metric over all test cases, its interval against both baselines'."""

from __future__ import annotations

from medfl.server.report import words
from medfl.server.report.run import Outcome, Run

PLAIN = "What the federated model reached"
UNKNOWN = "Whether federation paid cannot be told: the results have no intervals"
# Baseline: (its name, where the intervals overlap).
_BASELINES = {
    "local": ("training alone", "no better than"),
    "pooled": ("pooled training", "level with"),
}


def verdict(run: Run, metric: str | None) -> str:
    """One line: did federation pay? Says so only where the run trained the alternatives.

    Better and worse are said where the 95 % intervals lie apart, which is stricter than a test of
    the difference; else chance may explain what there is.
    """
    there = {n: run.baselines[n] for n in _BASELINES if n in run.baselines}
    if metric is None or run.federated.pooled.get(metric) is None:
        return PLAIN
    there = {name: o for name, o in there.items() if o.pooled.get(metric) is not None}
    if not there:
        return PLAIN
    sides = {name: side(run.federated, other, metric) for name, other in there.items()}
    if None in sides.values():
        return UNKNOWN
    parts = []
    for name, one in sides.items():
        what, level = _BASELINES[name]
        parts.append(f"{ {1: 'better than', 0: level, -1: 'worse than'}[one or 0] } {what}")
    text = " and ".join(parts)
    beyond = ", as far as these test cases tell" if 0 in sides.values() else ""
    return f"{text[0].upper()}{text[1:]}{beyond}{_otherwise(run, sides.get('local'), metric)}"


def side(ours: Outcome, theirs: Outcome, metric: str) -> int | None:
    """1 or -1 where the intervals over all test cases lie apart, 0 where not, None without any."""
    left, right = ours.pooled_intervals.get(metric), theirs.pooled_intervals.get(metric)
    if left is None or right is None:
        return None
    if left[0] <= right[1] and right[0] <= left[1]:
        return 0
    return 1 if (left[0] > right[1]) == words.measure(metric).larger_is_better else -1


def _otherwise(run: Run, alone: int | None, metric: str) -> str:
    """Where the mean over hospitals says the opposite of all test cases together."""
    if not alone:
        return ""
    mean = run.baselines["local"].mean.get(metric)
    gained = words.gained(metric, run.federated.mean.get(metric), mean)
    if gained is None or gained * alone >= 0:
        return ""
    return f"; but {'worse' if gained < 0 else 'better'} than alone on average over hospitals"
