"""Small numbers of patients in the prepare exchange do not leave a hospital as they are.

The coordinator sees each hospital's sums. "Two of our patients have the rare class" tells more of
those two than a study needs to know, and so does a sum over three values. A word that stands in one
patient's record may be a name: the levels of a category leave where enough patients have them. With
differential privacy noise covers this, and nothing here is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import Cohort
from medfl.common.codes import level
from medfl.common.statistics import LocalStatistics, Moments
from medfl.common.study import Study, Task

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Holders:
    """Training patients who have a value: of each number, and of each level of each category."""

    features: Mapping[str, int]
    levels: Mapping[str, Mapping[str, int]]


def holders(study: Study, cohort: Cohort, patients: Sequence[str]) -> Holders:
    """Counted over the training cases. patients: of each of them."""
    features: dict[str, int] = {}
    levels: dict[str, dict[str, int]] = {}
    rows = [cohort.records[i] for i in cohort.positions("train")] if cohort.records else []
    for feature in study.record.features if study.record is not None else ():
        found = [(t, p) for row, p in zip(rows, patients, strict=True)
                 if (t := row[feature.name]) is not None]  # fmt: skip
        if feature.kind == "number":
            features[feature.name] = len({p for _, p in found})
        else:
            pairs = {(level(t), p) for t, p in found}
            levels[feature.name] = dict(Counter(value for value, _ in pairs))
    return Holders(features, levels)


def fewest_of_a_class(task: Task, targets: NDArray[np.generic], patients: Sequence[str]) -> int:
    """Patients of the rarest class that is there, or of a label's rarer side; 0 without cases.

    targets: (N,) class indices, or (N, K) of 0 and 1 for several labels. patients: of each case.
    """
    n = len(task.classes)
    sides = (
        [targets[:, k] == on for k in range(n) for on in (0, 1)]
        if task.multi_label
        else [targets == k for k in range(n)]
    )
    names = np.asarray(patients)
    counts = [len(set(names[side])) for side in sides if side.any()]
    return min(counts, default=0)


def without_small(
    statistics: LocalStatistics, study: Study, smallest: int, of: Holders
) -> LocalStatistics:
    """The same, with no number from 1 to `smallest` - 1 that counts patients.

    Voxels of a class are not patients and stay. A number that few patients have is not summed, and
    a word that few have is not named.
    """
    counts = dict(enumerate(statistics.class_counts))
    if study.task.kind != "segmentation":
        counts = lifted(counts, smallest, parts=not study.task.multi_label)
    stated = {f.name: f.levels for f in study.record.features} if study.record is not None else {}
    return replace(
        statistics,
        class_counts=tuple(counts.values()),
        features={
            name: moments if of.features.get(name, 0) >= smallest else Moments()
            for name, moments in statistics.features.items()
        },
        levels={
            name: _levels(found, of.levels.get(name, {}), stated.get(name), smallest)
            for name, found in statistics.levels.items()
        },
    )


def _levels(
    counts: Mapping[str, int], of: Mapping[str, int], stated: Sequence[str] | None, smallest: int
) -> dict[str, int]:
    """Counts of the levels that may be named: those of the study's list, or that enough patients
    have. The most frequent one counts the others of an open list, so that no difference tells how
    many these are."""
    if stated is not None:
        names = {level(v) for v in stated}
        known = {value: n for value, n in counts.items() if value in names}
        return {value: int(n) for value, n in lifted(known, smallest, parts=True).items()}
    named = {value: n for value, n in counts.items() if of.get(value, 0) >= smallest}
    if named:
        named[max(named, key=lambda value: named[value])] += sum(counts.values()) - sum(
            named.values()
        )
    return named


def lifted(counts: Mapping[K, float], smallest: int, *, parts: bool) -> dict[K, float]:
    """Counts with those from 1 to `smallest` - 1 raised to `smallest`; none stays none.

    parts: they add up to something that is known elsewhere, so that the largest gives as much,
        and no difference tells the small one. It gives nothing where it would itself be small.
    """
    raised = {key: max(n, smallest) if n > 0 else n for key, n in counts.items()}
    extra = sum(raised.values()) - sum(counts.values())
    if parts and extra:
        largest = max(raised, key=lambda key: raised[key])
        raised[largest] = max(raised[largest] - extra, smallest)
    return raised
