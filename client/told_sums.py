"""What sums a hospital has told of whom, so that no difference of two tells of a few patients.

Sums of one cohort say little of each patient; the same sums a day later, without the one who
withdrew, say everything of that one. So sums are told once a cohort, and of another cohort only
where at least `policy.smallest_count` patients are others. The memory is one for all studies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from medfl.client.data.cases import Cohort
from medfl.client.journal import Journal
from medfl.common.errors import PolicyRefused
from medfl.common.signing import canonical
from medfl.common.statistics import LocalStatistics
from medfl.common.study import Study


@dataclass(frozen=True, slots=True)
class Told:
    """Sums that left. items: what was summed. patients: keyed hash -> digest of their part."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    study: str
    items: tuple[str, ...]
    patients: dict[str, str]


def tell(
    file: Path, study: Study, cohort: Cohort, statistics: LocalStatistics, smallest: int
) -> None:
    """Note that these sums leave, before they do; the same sums again are not noted again.

    Raises:
        PolicyRefused: they differ from earlier ones by fewer than `smallest` patients.
        StorageError: it could not be written down.
    """
    now = _told(study, cohort, statistics)
    if not now.items:
        return
    journal = Journal(file, Told)
    earlier = journal.lines()
    for before in earlier:
        changed = _changed(before, now)
        if 0 < changed < smallest:
            raise PolicyRefused(
                f"Sums over {', '.join(now.items[:5])} were told before, and only {changed} "
                f"training patients have changed since: the difference would give their values "
                f"away. They are told again when {smallest} have changed (policy.smallest_count); "
                "a study that states ranges, levels and class weights itself needs no sums."
            )
    if all((b.items, b.patients) != (now.items, now.patients) for b in earlier):
        journal.append(now)


def _changed(before: Told, now: Told) -> int:
    """Training patients whose part in both sums differs; 0 where nothing was summed in both.

    Where other things were summed as well, only who was in is compared.
    """
    if not set(before.items) & set(now.items):
        return 0
    if before.items != now.items:
        return len(set(before.patients) ^ set(now.patients))
    everybody = set(before.patients) | set(now.patients)
    return sum(before.patients.get(p) != now.patients.get(p) for p in everybody)


def _told(study: Study, cohort: Cohort, statistics: LocalStatistics) -> Told:
    summed = {name for name, moments in statistics.features.items() if moments.n}
    features = sorted(summed | {name for name, found in statistics.levels.items() if found})
    classes, voxels = bool(statistics.class_counts), bool(statistics.intensity)
    items = [*features, *(["classes"] if classes else []), *(["voxels"] if voxels else [])]
    parts: dict[str, list[str]] = {}
    for i in map(int, cohort.positions("train") if items else ()):
        sha = hashlib.sha256()
        if features:
            sha.update(canonical({name: cohort.records[i].get(name) for name in features}))
        if classes:
            sha.update(np.ascontiguousarray(cohort.targets[i]).tobytes())
        if voxels:
            sha.update(np.ascontiguousarray(cohort.inputs[i]).tobytes())
        parts.setdefault(cohort.cases[i].patient, []).append(sha.hexdigest())
    patients = {
        p: hashlib.sha256("".join(sorted(d)).encode()).hexdigest() for p, d in parts.items()
    }
    return Told(study.digest, tuple(items), {p: d[:16] for p, d in patients.items()})
