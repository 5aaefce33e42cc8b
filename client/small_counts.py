"""Small numbers of patients in the prepare exchange do not leave a hospital as they are.

The coordinator sees each hospital's sums. "Two of our patients have the rare class" tells more of
those two than a study needs to know, and so does a sum over three values. With differential privacy
noise covers this, and nothing here is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from medfl.common.statistics import LocalStatistics, Moments
from medfl.common.study import Study

K = TypeVar("K")


def without_small(statistics: LocalStatistics, study: Study, smallest: int) -> LocalStatistics:
    """The same, with no number from 1 to `smallest` - 1 that counts patients.

    Voxels of a class are not patients and stay. A number that few patients have is not summed.
    """
    counts = dict(enumerate(statistics.class_counts))
    if study.task.kind != "segmentation":
        counts = lifted(counts, smallest, parts=not study.task.multi_label)
    return replace(
        statistics,
        class_counts=tuple(counts.values()),
        features={
            name: moments if moments.n >= smallest else Moments()
            for name, moments in statistics.features.items()
        },
        levels={
            name: {level: int(n) for level, n in lifted(found, smallest, parts=True).items()}
            for name, found in statistics.levels.items()
        },
    )


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
