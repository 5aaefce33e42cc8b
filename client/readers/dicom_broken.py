"""Which series lost a slice because one of its files cannot be used."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DIGITS = re.compile(r"\d+")
# Other than by their names, nothing says that these were images.
_STRANGERS = ("not_dicom", "not_a_plain_file")
# Whole objects of another kind: no series misses them.
_NO_SLICES = ("not_an_image", "path_outside")


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that cannot be used. series: as its header says, "" where nothing can be read."""

    path: Path
    reason: str
    detail: str
    series: str = ""


def series_without_slices(
    broken: Sequence[Broken], images: Sequence[tuple[Path, dict[str, Any]]]
) -> dict[str, list[Broken]]:
    """By series: its files that cannot be used. Files of no series in `images` are left away.

    images: path and header of the files that can be used. A file that does not say its series
    belongs to the series of its neighbours, by name, in its folder; between two, to either.
    """
    known = {header["series"] for _, header in images}
    by_folder: dict[Path, list[tuple[Path, str]]] = defaultdict(list)
    for path, header in images:
        by_folder[path.parent].append((path, header["series"]))
    found: dict[str, list[Broken]] = defaultdict(list)
    for one in broken:
        if one.reason in _NO_SLICES:
            continue
        there = by_folder.get(one.path.parent, [])
        named = {one.series} if one.series else _neighbours(one, there)
        for series in sorted(named & known):
            found[series].append(one)
    return found


def _neighbours(broken: Broken, there: Sequence[tuple[Path, str]]) -> set[str]:
    """The series of the files before and after it, of those that are called like it."""
    alike = [(p, s) for p, s in there if _shape(p) == _shape(broken.path)]
    if not alike:
        alike = [] if broken.reason in _STRANGERS else list(there)
    before = [entry for entry in alike if _order(entry[0]) < _order(broken.path)]
    after = [entry for entry in alike if _order(entry[0]) > _order(broken.path)]
    nearest = [max(before, key=lambda e: _order(e[0]))] if before else []
    nearest += [min(after, key=lambda e: _order(e[0]))] if after else []
    return {series for _, series in nearest}


def _shape(path: Path) -> str:
    return _DIGITS.sub("#", path.name.casefold())


def _order(path: Path) -> tuple[Any, ...]:
    """As people count: 9 before 10."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in parts)
