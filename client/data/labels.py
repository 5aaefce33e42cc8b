"""From the texts in a hospital's files to the study's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef
from medfl.common.codes import folded, level, number
from medfl.common.errors import CaseError
from medfl.common.records import plausible
from medfl.common.source import DataSource, Format
from medfl.common.study import Feature, Study, Task

# These formats have no class names of their own: a class is its number.
INDEX_FORMATS: tuple[Format, ...] = ("medmnist", "hdf5")


def class_index(text: str, task: Task, *, numbers: bool) -> int:
    """The class that a text stands for: by label_map, by name, or (`numbers`) by its number.

    Texts are compared as they are written; only where nothing agrees is "1.0" the code "1".

    Raises:
        CaseError: "label_unknown".
    """
    names = [name.strip() for name in task.classes]
    known = {name: index for index, name in enumerate(names)}
    known |= {code.strip(): names.index(c.strip()) for code, c in (task.label_map or {}).items()}
    value = text.strip()
    found = known.get(value, only_level(value, known))
    if found is not None:
        return found
    value = level(value)
    if numbers and value.isascii() and value.isdecimal() and int(value) < len(names):
        return int(value)
    alike = [code for code in known if folded(code) == folded(text)]
    hint = f"; the study has {', '.join(map(repr, alike))}" if alike else ""
    raise CaseError("label_unknown", f"the label {text!r}{hint}")


def only_level(text: str, known: Mapping[str, int]) -> int | None:
    """The value of the codes that agree with `text` but for ".0"; None where they disagree."""
    found = {value for code, value in known.items() if level(code) == level(text)}
    return found.pop() if len(found) == 1 else None


def class_target(ref: CaseRef, source: DataSource, study: Study) -> int | NDArray[np.float32]:
    """A case's class index, or (K,) 0/1 for multi-label studies.

    Multi-label: one 0/1 column a class, else one column of names with `|` between them; a lone
    `|` says that none applies (an empty cell is a missing label).

    Raises:
        CaseError: "label_missing" or "label_unknown".
    """
    task, numbers = study.task, source.format in INDEX_FORMATS
    if task.multi_label:
        return _multi_hot(ref, source, task, numbers)
    text = ref.fields.get("label", "").strip()
    if text in source.missing:
        raise CaseError("label_missing")
    return class_index(text, task, numbers=numbers)


def _multi_hot(ref: CaseRef, source: DataSource, task: Task, numbers: bool) -> NDArray[np.float32]:
    target = np.zeros(len(task.classes), dtype=np.float32)
    # A reader gives each column under the study's name, too; that one has the site's `values`.
    columns = [c if c in ref.fields else source.column(c) for c in task.classes]
    if all(c in ref.fields for c in columns):
        for position, column in enumerate(columns):
            text = ref.fields[column].strip()
            if text in source.missing:
                raise CaseError("label_missing", f"the column {column}")
            if level(text) not in ("0", "1"):
                raise CaseError("label_unknown", f"the column {column} is neither 0 nor 1")
            target[position] = float(level(text))
        return target
    text = ref.fields.get("label", "").strip()
    if text in source.missing:
        raise CaseError("label_missing")
    for name in filter(None, (part.strip() for part in text.split("|"))):
        target[class_index(name, task, numbers=numbers)] = 1.0
    return target


def record_of(
    ref: CaseRef, source: DataSource, features: list[Feature]
) -> Mapping[str, str | None]:
    """The features' texts of one record; None = missing or beyond the study's range; codes as
    `level` spells them.

    Raises:
        CaseError: "feature_absent", "feature_not_a_number" or "feature_level".
    """
    record: dict[str, str | None] = {}
    for feature in features:
        text = text_of_feature(ref, source, feature)
        if text is None:
            raise CaseError("feature_absent", f"the column {source.column(feature.name)}")
        if text in source.missing:
            record[feature.name] = None
            continue
        record[feature.name] = _feature_text(text, feature)
    return record


def _feature_text(text: str, feature: Feature) -> str | None:
    if feature.kind == "number":
        try:
            value = number(text)
        except CaseError:
            raise CaseError("feature_not_a_number", f"{feature.name} is {text!r}") from None
        return text if plausible(feature, value) else None
    known = {code.strip(): place for place, code in enumerate(feature.levels or ())}
    if feature.levels is not None and known.get(text, only_level(text, known)) is None:
        alike = [code for code in known if folded(code) == folded(text)]
        hint = f"; the study has {', '.join(map(repr, alike))}" if alike else ""
        raise CaseError("feature_level", f"{feature.name} is {text!r}{hint}")
    return level(text)


def beyond_range(ref: CaseRef, source: DataSource, features: Sequence[Feature]) -> list[str]:
    """`field is value` of each number of a record that the study's range does not hold."""
    return [
        f"{feature.name} is {text}"
        for feature in features
        if feature.kind == "number"
        and (text := text_of_feature(ref, source, feature))
        and text not in source.missing
        and (value := number_or_none(text)) is not None
        and not plausible(feature, value)
    ]


def text_of_feature(ref: CaseRef, source: DataSource, feature: Feature) -> str | None:
    """A field of a record as it is written; None where the table has no such column."""
    text = ref.fields.get(feature.name, ref.fields.get(source.column(feature.name)))
    return None if text is None else text.strip()


def number_or_none(text: str) -> float | None:
    """A text's number; None where it is none."""
    try:
        return number(text)
    except CaseError:
        return None
