"""Decimal marks of a table's numbers: as site.toml says, else as the column shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from medfl.client.data.cases import CaseRef
from medfl.client.data.labels import text_of_feature
from medfl.common.source import DataSource
from medfl.common.study import Feature

_MARKED = re.compile(r"[+-]?([0-9]*)([.,])([0-9]*)([eE][+-]?[0-9]+)?")
UNCLEAR = "; is the mark the decimal one? Say `decimal` in site.toml"


def with_points(
    refs: Sequence[CaseRef], source: DataSource, features: Sequence[Feature]
) -> list[CaseRef]:
    """The same records with a point as the decimal mark of every number.

    Three digits behind a mark may be thousands. Where site.toml does not say `decimal`, other
    numbers of the column tell; 1,234 where none does stays as it is and is no number.
    """
    changed: dict[int, dict[str, str]] = {}
    for feature in features:
        if feature.kind != "number":
            continue
        texts = [(text_of_feature(ref, source, feature) or "") for ref in refs]
        marks = source.decimal or _marks_of(texts)
        for place, text in enumerate(texts):
            if (plain := _with_point(text, marks)) != text:
                changed.setdefault(place, {})[feature.name] = plain
    return [
        replace(ref, fields={**ref.fields, **changed[place]}) if place in changed else ref
        for place, ref in enumerate(refs)
    ]


def _marks_of(texts: Sequence[str]) -> str:
    """The marks that are decimal beyond doubt in a column; "." where it shows no comma."""
    found = [match for text in texts if (match := _MARKED.fullmatch(text))]
    sure = {match[2] for match in found if not _may_be_thousands(match)}
    if not sure and all(match[2] == "." for match in found):
        return "."
    return "".join(sorted(sure))


def _may_be_thousands(match: re.Match[str]) -> bool:
    whole, behind = match[1], match[3]
    return len(behind) == 3 and 1 <= len(whole) <= 3 and not whole.startswith("0") and not match[4]


def _with_point(text: str, marks: str) -> str:
    match = _MARKED.fullmatch(text)
    if match is None:
        return text
    mark = match[2]
    if mark not in marks or (len(marks) > 1 and _may_be_thousands(match)):
        return text + UNCLEAR
    return text.replace(",", ".")
