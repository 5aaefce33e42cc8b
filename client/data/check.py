"""What a hospital's data are worth to a study, before anything is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from medfl.client import budget, foreseen
from medfl.client.data import own
from medfl.client.data.cases import Case, Cohort, Split
from medfl.client.data.cohort import Examined
from medfl.client.data.fields import Field, describe_field, field_notes, fields_of
from medfl.client.data.preprocess import Facts
from medfl.client.data.quality import explained
from medfl.client.data.reasons import NOT_FAULTY, REASONS
from medfl.common.errors import DataError, PolicyRefused
from medfl.common.site import Site
from medfl.common.study import Study

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Cases left out for one reason. faulty: counts against the study's limit."""

    reason: str
    cases: int
    text: str
    faulty: bool


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest, middle and largest value over the cases."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class Pictures:
    """Summaries over the usable cases as they lie on disk.

    sizes: along each spatial axis. spacing_mm: likewise, () where unknown. shapes: how many
    different sizes there are. intensity: of the cases' medians; darkest and brightest: of their
    0.5 and 99.5 percentiles.
    """

    sizes: tuple[Range, ...]
    spacing_mm: tuple[Range, ...]
    shapes: int
    darkest: Range
    intensity: Range
    brightest: Range


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The check of one site for one study; counts and words only, no name of case or patient.

    faults: why the site cannot take part; notes: what to look at. classes: cases a class and part
    (segmentation: voxels). patients: by part. digest: of the cohort, "" where there are faults.
    """

    site: str
    study: str
    study_digest: str
    usable: int
    left_out: tuple[LeftOut, ...]
    duplicates: int
    cases: Mapping[Split, int]
    patients: Mapping[Split, int]
    classes: Mapping[Split, Mapping[str, int]]
    pictures: Pictures | None
    features: tuple[Field, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str
    exit_code: int = 0

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Checked:
    """The result, with the cohort that the page takes its pictures from."""

    result: CheckResult
    cohort: Cohort = field(repr=False)


def check(site: Site, study: Study) -> CheckResult:
    """Examine a site's data for a study.

    Raises:
        PolicyRefused: no data set of the site is for this study.
        DataError: nothing can even be listed.
    """
    return check_with_cohort(site, study).result


def check_with_cohort(
    site: Site, study: Study, *, n_jobs: int | None = None, details: bool = False
) -> Checked:
    """`check`, with the cohort that was built for it. details: as `examine`."""
    examined = own.examined(site, study, n_jobs, details)
    policy = _policy_faults(site, study, examined.cohort)
    listed = explained(examined.cohort.quarantined)  # is said by the list of what is left out
    faults = (*(f for f in examined.faults if f != listed), *policy)
    code = DataError.exit_code if examined.faults else PolicyRefused.exit_code if policy else 0
    cohort = examined.cohort
    features = _features(examined, site, study)
    result = CheckResult(
        site=site.name,
        study=study.name,
        study_digest=study.digest,
        usable=len(cohort.cases),
        left_out=_left_out(cohort),
        duplicates=sum(q.reason in ("duplicate", "duplicate_id") for q in cohort.quarantined),
        cases={s: len(cohort.positions(s)) for s in SPLITS},
        patients={s: _patients(cohort.cases, s) for s in SPLITS},
        classes={s: _classes(cohort, study, s) for s in SPLITS},
        pictures=_pictures([f for f in examined.facts if f is not None]),
        features=features,
        faults=faults,
        notes=(*_role(site), *examined.notes, *field_notes(features)),
        digest="" if faults else cohort.digest,
        exit_code=code,
    )
    return Checked(result, cohort)


def _role(site: Site) -> tuple[str, ...]:
    if not site.policy.evaluate_only:
        return ()
    return (
        "This hospital only evaluates (policy.evaluate_only): all its cases are test cases, and "
        "nothing is trained here.",
    )


def _policy_faults(site: Site, study: Study, cohort: Cohort) -> tuple[str, ...]:
    """What the hospital would answer if it were asked to train, all at once."""

    def patients(part: Split) -> list[str]:
        return [cohort.cases[i].patient for i in cohort.positions(part)]

    terms = budget.terms_of(study, site.privacy)
    return (
        *foreseen.by_policy(study, site.policy, terms),
        *foreseen.by_size(
            site.policy,
            site.policy.smallest_count,
            patients(foreseen.taking_part(site.policy)),
            terms,
        ),
        *foreseen.by_budget(site, study, terms, patients),
    )


def _left_out(cohort: Cohort) -> tuple[LeftOut, ...]:
    counts = Counter(q.reason for q in cohort.quarantined)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(LeftOut(r, n, REASONS[r], r not in NOT_FAULTY) for r, n in ranked)


def _patients(cases: Sequence[Case], split: Split) -> int:
    return len({c.patient for c in cases if c.split == split})


def _classes(cohort: Cohort, study: Study, split: Split) -> dict[str, int]:
    """Cases a class of one part; voxels for a segmentation."""
    names, positions = study.task.classes, cohort.positions(split)
    counts = np.zeros(len(names), dtype=np.int64)
    if study.task.kind == "segmentation":
        for i in positions:
            counts += np.bincount(np.asarray(cohort.targets[int(i)]).ravel(), minlength=len(names))
    elif len(positions):
        targets = np.asarray(cohort.targets)[positions]
        if study.task.multi_label:
            counts = targets.sum(axis=0).astype(np.int64)
        else:
            counts = np.bincount(targets, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _range(values: Sequence[float]) -> Range:
    return Range(min(values), float(np.median(values)), max(values))


def _ranges(rows: Sequence[tuple[float, ...]]) -> tuple[Range, ...]:
    return tuple(_range([float(v) for v in axis]) for axis in zip(*rows, strict=False))


def _pictures(facts: Sequence[Facts]) -> Pictures | None:
    if not facts:
        return None
    return Pictures(
        sizes=_ranges([f.size for f in facts]),
        spacing_mm=_ranges([f.spacing_mm for f in facts if f.spacing_mm]),
        shapes=len({f.size for f in facts}),
        darkest=_range([f.low for f in facts]),
        intensity=_range([f.median for f in facts]),
        brightest=_range([f.high for f in facts]),
    )


def _features(examined: Examined, site: Site, study: Study) -> tuple[Field, ...]:
    if study.record is None:
        return ()
    return fields_of(examined.listed, site.of_study(study.name).source, study.record.features)


def describe(result: CheckResult) -> list[str]:
    """The result as lines for a terminal."""
    lines = [f"{result.site} for {result.study}: {result.usable} usable cases"]
    for split in SPLITS:
        classes = ", ".join(f"{n} {c}" for n, c in result.classes[split].items())
        patients = f"{result.patients[split]} patients"
        lines.append(f"  {split:<11}{result.cases[split]:>6} cases, {patients} ({classes})")
    if result.left_out:
        lines.append("Left out (of this study only; every file stays as it is):")
        lines += [f"  {item.cases:>6} {item.reason}: {item.text}" for item in result.left_out]
    if result.pictures is not None:
        lines += _describe_pictures(result.pictures)
    lines += [f"  {describe_field(field)}" for field in result.features]
    lines += [f"Note: {note}" for note in result.notes]
    lines += [f"Cannot take part: {fault}" for fault in result.faults]
    if result.digest:
        lines.append(f"Ready to take part. Cohort {result.digest}")
    return lines


def _describe_pictures(pictures: Pictures) -> list[str]:
    def spans(ranges: Sequence[Range]) -> str:
        return " × ".join(text_of(r) for r in ranges)

    lines = [f"Sizes: {spans(pictures.sizes)} ({pictures.shapes} different)"]
    if pictures.spacing_mm:
        lines.append(f"Spacing in mm: {spans(pictures.spacing_mm)}")
    lines.append(
        f"Intensity: darkest {text_of(pictures.darkest)}, median {text_of(pictures.intensity)}, "
        f"brightest {text_of(pictures.brightest)}"
    )
    return lines


def text_of(values: Range) -> str:
    """`low to high`, or the one value where they agree."""
    if math.isclose(values.low, values.high, rel_tol=1e-3):
        return f"{values.low:.4g}"
    return f"{values.low:.4g} to {values.high:.4g}"
