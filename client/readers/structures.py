"""Which class of a study a drawn structure (a segment, a region of interest) stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medfl.common.errors import CaseError
from medfl.common.study import Task

# "Segment 1", "Segment_1" or "1": programs' own labels, which say no more than the number.
_NUMBERED = re.compile(r"(?:segment|seg|label|class|roi)?[\s_-]*0*(\d+)", re.IGNORECASE)
# A line of label_map for every structure that no other line and no class names.
ANY = "*"


@dataclass(frozen=True, slots=True)
class Names:
    """What structures are called: text -> class number.

    mapped: the lines of label_map (labels, codes, numbers, or `*` for all others). classes: the
    study's own names.
    """

    mapped: Mapping[str, int]
    classes: Mapping[str, int]


def names_of(task: Task) -> Names:
    """The texts by which the structures of a task are known."""
    classes = {name.strip(): number for number, name in enumerate(task.classes)}
    lines = (task.label_map or {}).items()
    return Names({text.strip(): classes[name.strip()] for text, name in lines}, classes)


def class_of(label: str, codes: Sequence[str], number: int, names: Names) -> int:
    """The class of one structure: by its label, its code, or the words for all others.

    codes: of what it shows, each as value and as scheme:value. number: counts only where the label
    says no more than the number, for numbers follow the order of writing.

    Raises:
        CaseError: "segment_unknown", or "segment_ambiguous" where label and code disagree.
    """
    label = label.strip()
    found = {names.mapped[code] for code in codes if code in names.mapped}
    if (by_label := _by_label(label, names)) is not None:
        found.add(by_label)
    if len(found) > 1:
        raise CaseError("segment_ambiguous", f"label and code of the structure {label!r} disagree")
    if found:
        return found.pop()
    only_number = _NUMBERED.fullmatch(label)
    if not label or (only_number and int(only_number[1]) == number):
        if str(number) in names.mapped:
            return names.mapped[str(number)]
        # An unknown code may well speak of another class; with one structure to tell it cannot.
        if 0 < number < len(names.classes) and (not codes or len(names.classes) == 2):
            return number
    if ANY in names.mapped:
        return names.mapped[ANY]
    shown = f"the structure {label!r}" + (f" with the code {codes[-1]}" if codes else "")
    raise CaseError("segment_unknown", f"{shown} is none of the study's classes")


def _by_label(label: str, names: Names) -> int | None:
    """As written; else, where that is one class alone, without regard to capitals."""
    for known in (names.mapped, names.classes):
        if label in known:
            return known[label]
    both = [*names.mapped.items(), *names.classes.items()]
    alike = {number for text, number in both if text.casefold() == label.casefold()}
    if len(alike) > 1:
        raise CaseError("segment_ambiguous", f"the structure {label!r} is alike several classes")
    return alike.pop() if alike else None
