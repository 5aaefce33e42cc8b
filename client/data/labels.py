"""From the texts in a hospital's files to the study's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef
from medfl.common.errors import CaseError
from medfl.common.source import DataSource, Format
from medfl.common.study import Feature, Study, Task

# These formats have no class names of their own: a class is its number.
INDEX_FORMATS: tuple[Format, ...] = ("medmnist", "hdf5")


def canonical(text: str) -> str:
    """A text without outer blanks; numbers in one spelling, so that "1", "1.0" and "1e0" agree."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else repr(number)


def class_index(text: str, task: Task, *, numbers: bool) -> int:
    """The class that a text stands for: by label_map, by name, or (`numbers`) by its number.

    Raises:
        CaseError: "label_unknown".
    """
    value = canonical(text)
    mapped = {canonical(k): v for k, v in (task.label_map or {}).items()}
    name = mapped.get(value, value)
    names = [canonical(c) for c in task.classes]
    if canonical(name) in names:
        return names.index(canonical(name))
    if numbers and value.isdecimal() and int(value) < len(names):
        return int(value)
    raise CaseError("label_unknown", f"the label {text!r}")


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
    columns = [source.column(c) for c in task.classes]
    if all(c in ref.fields for c in columns):
        for position, column in enumerate(columns):
            text = ref.fields[column].strip()
            if text in source.missing:
                raise CaseError("label_missing", f"the column {column}")
            if canonical(text) not in ("0", "1"):
                raise CaseError("label_unknown", f"the column {column} is neither 0 nor 1")
            target[position] = float(canonical(text))
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
    """The features' texts of one record; None = missing; categories in canonical spelling.

    Raises:
        CaseError: "feature_absent", "feature_not_a_number" or "feature_level".
    """
    record: dict[str, str | None] = {}
    for feature in features:
        text = _text_of(ref, source, feature)
        if text is None:
            raise CaseError("feature_absent", f"the column {source.column(feature.name)}")
        if text in source.missing:
            record[feature.name] = None
            continue
        record[feature.name] = _feature_text(text, feature)
    return record


def _feature_text(text: str, feature: Feature) -> str:
    if feature.kind == "number":
        try:
            number = float(text)
        except ValueError:
            raise CaseError("feature_not_a_number", f"{feature.name} is {text!r}") from None
        if not np.isfinite(number):
            raise CaseError("feature_not_a_number", f"{feature.name} is {text!r}")
        return text
    level = canonical(text)
    if feature.levels is not None and level not in {canonical(v) for v in feature.levels}:
        raise CaseError("feature_level", f"{feature.name} is {text!r}")
    return level


def missing_and_odd(
    refs: Sequence[CaseRef], source: DataSource, features: Sequence[Feature]
) -> dict[str, tuple[int, int]]:
    """By feature: how many of the listed records miss it, how many lie outside its range."""
    found: dict[str, tuple[int, int]] = {}
    for feature in features:
        texts = [_text_of(ref, source, feature) for ref in refs]
        there = [text for text in texts if text is not None and text not in source.missing]
        odd = 0
        if feature.range is not None:
            low, high = feature.range
            odd = sum(not low <= n <= high for n in map(_number, there) if n is not None)
        found[feature.name] = len(texts) - len(there), odd
    return found


def _text_of(ref: CaseRef, source: DataSource, feature: Feature) -> str | None:
    text = ref.fields.get(source.column(feature.name), ref.fields.get(feature.name))
    return None if text is None else text.strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
