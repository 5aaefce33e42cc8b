"""Codes of a table stay the texts that they are, and numbers are what the study says they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medfl.client.data.cohort import build_cohort
from medfl.client.data.labels import class_index
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import Feature, Quality, RecordInput, Study, Task

Studies = Callable[..., Study]
LENIENT = Quality(max_quarantined=0.9, min_cases=1)
AGE = Feature(name="age", range=(0.0, 120.0))


def table(folder: Path, *lines: str) -> DataSource:
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataSource(format="table", path=folder / "t.csv")


def risk(study: Studies, *features: Feature, missing: str = "indicator", **more: object) -> Study:
    record = RecordInput(features=list(features), scale="none", missing=missing)  # type: ignore[arg-type]
    return study("risk", record=record, quality=LENIENT, **more)


def test_two_codes_of_eighteen_digits_are_two_classes() -> None:
    # As floats both are 123456789012345680, so that the first class had all cases.
    one, other = "123456789012345678", "123456789012345679"
    task = Task(kind="classification", classes=["healthy", "ill"], label_map=None)
    mapped = Task(
        kind="classification", classes=["healthy", "ill"], label_map={one: "healthy", other: "ill"}
    )
    assert [class_index(t, mapped, numbers=False) for t in (one, other)] == [0, 1]
    with pytest.raises(CaseError):
        class_index("1E0", task, numbers=True)


def test_codes_with_leading_zeros_are_their_own_and_the_hint_says_what_looks_alike() -> None:
    task = Task(kind="classification", classes=["007", "7"])
    assert [class_index(t, task, numbers=False) for t in ("007", "7")] == [0, 1]
    with pytest.raises(CaseError) as told:
        class_index("07", task, numbers=False)
    assert (told.value.reason, told.value.detail) == (
        "label_unknown",
        "the label '07'; the study has '007', '7'",
    )


def test_point_zero_counts_only_where_nothing_else_agrees() -> None:
    task = Task(kind="classification", classes=["1", "1.0", "2"])
    assert [class_index(t, task, numbers=False) for t in ("1", "1.0", "2.0")] == [0, 1, 2]
    with pytest.raises(CaseError):
        class_index("1.00", task, numbers=False)


def test_a_number_beyond_the_studys_range_is_missing(tmp_path: Path, study: Studies) -> None:
    source = table(tmp_path, "case,age,label", "a,63,no", "b,999,yes", "c,-1,no", "d,1_2,yes")
    cohort = build_cohort(source, risk(study, AGE), cache=None)
    assert sorted(str(r["age"]) for r in cohort.records) == ["63", "None", "None"]
    assert [(q.case_id, q.reason) for q in cohort.quarantined] == [("d", "feature_not_a_number")]


def test_a_study_of_complete_records_leaves_it_out_and_says_the_number(
    tmp_path: Path, study: Studies
) -> None:
    source = table(tmp_path, "case,age,label", "a,63,no", "b,999,yes", "c,,no")
    cohort = build_cohort(source, risk(study, AGE, missing="drop"), cache=None)
    assert np.asarray(cohort.targets).tolist() == [0]
    assert [(q.case_id, q.reason, q.detail) for q in cohort.quarantined] == [
        ("b", "implausible", "age is 999"),
        ("c", "incomplete_record", ""),
    ]


def test_a_category_keeps_the_digits_of_its_codes(tmp_path: Path, study: Studies) -> None:
    codes = Feature(name="code", kind="category")
    source = table(tmp_path, "case,code,label", "a,007,no", "b,7.0,yes", "c,1E2,no")
    cohort = build_cohort(source, risk(study, codes), cache=None)
    assert sorted(str(r["code"]) for r in cohort.records) == ["007", "1E2", "7"]
