"""PS3.15 Table E.1-1 as data, and what a site's options make of it.

`table_e1_1.csv` holds the column "Basic Prof." of edition 2026c and the options' columns of edition
2024d; attributes that are newer than that have no entry for any option, and so the Basic Profile
stays in force for them. `kept.txt` lists what may stay of everything that the table does not name.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from medfl.common.site import Deid

EDITION = "2026c"
Action = Literal["remove", "empty", "dummy", "uid", "items", "keep", "shift", "words"]

# Where the standard leaves a choice by the object's type, the one that no type forbids is taken.
_BASIC: dict[str, Action] = {
    "X": "remove",
    "Z": "empty",
    "D": "dummy",
    "U": "uid",
    "X/Z": "empty",
    "Z/D": "dummy",
    "X/D": "dummy",
    "X/Z/D": "dummy",
    "X/Z/U*": "items",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One attribute's action codes as the standard writes them; "" where an option is silent."""

    keyword: str
    basic: str
    device: str
    institution: str
    patient: str
    full_dates: str
    modified_dates: str
    descriptors: str


def _text(name: str) -> str:
    return files("medfl.client.deid").joinpath(name).read_text(encoding="ascii")


@cache
def rows() -> dict[int, Row]:
    """The table by tag; repeating groups and private attributes are treated by rule."""
    lines = csv.reader(_text("table_e1_1.csv").splitlines()[1:])
    return {int(tag, 16): Row(*columns) for tag, *columns in lines}


@cache
def kept() -> frozenset[str]:
    """Keywords outside the table that stay."""
    lines = (line for line in _text("kept.txt").splitlines() if not line.startswith("#"))
    return frozenset(word for line in lines for word in line.split())


def action(row: Row, options: Deid) -> Action:
    """What happens to an attribute of the table under a site's options."""
    chosen = [
        options.retain_device and row.device,
        options.retain_institution and row.institution,
        options.retain_patient_characteristics and row.patient,
        options.retain_longitudinal == "full" and row.full_dates,
    ]
    if "K" in chosen:
        return "keep"
    if options.retain_longitudinal == "shifted" and row.modified_dates:
        return "shift"
    if options.clean_descriptors and row.descriptors:
        return "words"
    # An option's "C" for a free text is met by the Basic Profile: what is gone identifies nobody.
    return _BASIC[row.basic]


# CID 7050 (PS3.16): code value and meaning.
PROFILE = ("113100", "Basic Application Confidentiality Profile")
_CODES = {
    "retain_device": ("113109", "Retain Device Identity Option"),
    "retain_institution": ("113112", "Retain Institution Identity Option"),
    "retain_patient_characteristics": ("113108", "Retain Patient Characteristics Option"),
    "clean_descriptors": ("113105", "Clean Descriptors Option"),
    "retain_safe_private": ("113111", "Retain Safe Private Option"),
}
_DATES = {
    "full": ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    "shifted": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
}


def method_codes(options: Deid) -> list[tuple[str, str]]:
    """The profile and the options that were applied, by CID 7050."""
    codes = [PROFILE, *(code for name, code in _CODES.items() if getattr(options, name))]
    if options.retain_longitudinal in _DATES:
        codes.append(_DATES[options.retain_longitudinal])
    return sorted(codes)
