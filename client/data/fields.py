"""What the fields of a hospital's records hold: span, share missing, numbers that stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medfl.client.data.cases import CaseRef
from medfl.client.data.labels import number_or_none, text_of_feature
from medfl.common.records import plausible
from medfl.common.source import DataSource
from medfl.common.study import Feature

# Numbers that people write for "not known", and 0.
_STAND_INS = (0, -1, -9, -99, -999, -9999, 99, 999, 9999, 99999)
# A stand-in is told where it lies so many standard deviations of the others from all of them.
_APART_SD = 2.0
_FEWEST_OTHERS = 3


@dataclass(frozen=True, slots=True)
class Field:
    """One field over all listed records.

    missing, implausible: records without it, and beyond the study's range, which count as missing.
    low, median, high: of all its numbers as they are written; None where there are none.
    stand_ins: numbers that may stand for "not known", with how often they occur.
    """

    name: str
    records: int
    missing: int
    implausible: int
    unit: str | None = None
    range: tuple[float, float] | None = None
    low: float | None = None
    median: float | None = None
    high: float | None = None
    stand_ins: tuple[tuple[float, int], ...] = ()

    @property
    def share_missing(self) -> float:
        """Of the records, without those beyond the range."""
        return self.missing / self.records if self.records else 0.0


def fields_of(
    refs: Sequence[CaseRef], source: DataSource, features: Sequence[Feature]
) -> tuple[Field, ...]:
    """Each feature of a study over the listed records."""
    return tuple(_field(refs, source, feature) for feature in features)


def _field(refs: Sequence[CaseRef], source: DataSource, feature: Feature) -> Field:
    texts = [text_of_feature(ref, source, feature) for ref in refs]
    there = [text for text in texts if text is not None and text not in source.missing]
    missing = len(texts) - len(there)
    if feature.kind != "number":
        return Field(feature.name, len(texts), missing, 0)
    numbers = [n for n in map(number_or_none, there) if n is not None]
    return Field(
        feature.name,
        len(texts),
        missing,
        sum(not plausible(feature, n) for n in numbers),
        feature.unit,
        feature.range,
        min(numbers, default=None),
        float(np.median(numbers)) if numbers else None,
        max(numbers, default=None),
        stand_ins(numbers),
    )


def stand_ins(numbers: Sequence[float]) -> tuple[tuple[float, int], ...]:
    """Numbers such as 999 or -1 that lie far from all others of a field, with their counts."""
    found: list[tuple[float, int]] = []
    rest = np.array(numbers, dtype=np.float64)
    again = True
    while again:  # -1 and 999 in one field hide each other's distance
        again = False
        for value in _STAND_INS:
            others = rest[rest != value]
            count = rest.size - others.size
            if not count or others.size < _FEWEST_OTHERS:
                continue
            known = others[~np.isin(others, _STAND_INS)]
            spread = known if known.size >= _FEWEST_OTHERS else others
            gap = max(float(others.min()) - value, value - float(others.max()))
            if gap > _APART_SD * float(spread.std()):
                found.append((float(value), int(count)))
                rest, again = others, True
    return tuple(sorted(found))


def field_notes(fields: Sequence[Field]) -> tuple[str, ...]:
    """What a hospital should look at before it takes part."""
    notes = []
    for field in fields:
        if field.stand_ins:
            values = ", ".join(f"{v:g} in {n} records" for v, n in field.stand_ins)
            notes.append(
                f"{field.name}: {values}, far from all others. If it stands for a value that is "
                "not known, add it to `missing` in site.toml."
            )
        if field.low is not None and field.low == field.high and field.records >= _FEWEST_OTHERS:
            notes.append(f"{field.name}: {field.low:g} in every record; is that right?")
        if field.implausible:
            notes.append(
                f"{field.name}: {field.implausible} of {field.records} records lie beyond the "
                "study's range and count as missing. Is it in the study's unit"
                + (f" ({field.unit})?" if field.unit else "?")
            )
    return tuple(notes)


def describe_field(field: Field) -> str:
    """One line for a terminal."""
    unit = f" ({field.unit})" if field.unit else ""
    parts = []
    if field.low is not None:
        parts.append(f"{field.low:.4g} to {field.high:.4g}, median {field.median:.4g}")
    parts.append(f"missing in {field.missing} of {field.records} ({field.share_missing:.0%})")
    if field.range is not None:
        low, high = field.range
        parts.append(f"beyond {low:g} to {high:g} in {field.implausible}")
    return f"{field.name}{unit}: {'; '.join(parts)}"
