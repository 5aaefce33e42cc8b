"""What a study's [quality] table refuses, and what a hospital should look at, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from medfl.client.data.cases import Cohort, Quarantined
from medfl.client.data.reasons import KEPT, NOT_FAULTY, REASONS
from medfl.common.study import Study


def quality_faults(usable: int, quarantined: Sequence[Quarantined], study: Study) -> list[str]:
    """What the study's [quality] table refuses, one message each; `explained` has the remedies."""
    counts = Counter(q.reason for q in quarantined)
    faults = []
    faulty = sum(n for reason, n in counts.items() if reason not in NOT_FAULTY)
    limit = study.quality.max_quarantined
    if faulty > limit * (usable + faulty):
        faults.append(
            f"{faulty} of {usable + faulty} cases cannot be used; the study allows {limit:.0%}."
        )
    if usable < study.quality.min_cases:
        faults.append(
            f"{usable} usable cases; the study needs {study.quality.min_cases}. "
            "Check `path` and `table` in site.toml."
        )
    return faults


def explained(quarantined: Sequence[Quarantined]) -> str:
    """One line a reason, most frequent first; where a list of what is left out is not shown."""
    counts = Counter(q.reason for q in quarantined)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"  {n} × {reason}: {REASONS[reason]}" for reason, n in ranked]
    return "\n".join([*lines, KEPT] if lines else [])


def notes_on(cohort: Cohort, study: Study) -> tuple[str, ...]:
    notes = []
    if study.task.kind != "segmentation" and not study.task.multi_label and cohort.cases:
        present = np.unique(np.asarray(cohort.targets))
        if len(present) == 1:
            notes.append("All usable cases are of one class; that is allowed, but look at it.")
    for part in ("train", "test"):
        if cohort.cases and not any(c.split == part for c in cohort.cases):
            notes.append(f"No case is in the {part} part.")
    return tuple(notes)
