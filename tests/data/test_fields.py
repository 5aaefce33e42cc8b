"""What `check` says of the fields of records, and what stands for "not known"."""

from __future__ import annotations

import pytest

from medfl.client.data.cases import CaseRef
from medfl.client.data.fields import describe_field, field_notes, fields_of, stand_ins
from medfl.common.source import DataSource
from medfl.common.study import Feature


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ([41, 47, 52, 999, 999], ((999, 2),)),
        ([41, 47, 52, -1], ((-1, 1),)),
        ([41, 47, 52, -1, 999], ((-1, 1), (999, 1))),
        ([0, 0, 126, 230, 250, 240], ((0, 2),)),
        ([0.0, 0.0, 0.4, 1.2, 3.1], ()),  # no depression of the ST segment is a finding
        ([97, 98, 99, 96], ()),
        ([-1, 0, 1, 2], ()),
        ([7, 999], ()),
    ],
)
def test_numbers_that_stand_for_not_known_are_told(
    numbers: list[float], told: tuple[tuple[float, int], ...]
) -> None:
    assert stand_ins(numbers) == told


def test_a_field_is_told_with_its_span_unit_and_share_missing() -> None:
    # 40, 50, 60 and 999 of five: median (50 + 60) / 2 = 55, one of five missing.
    age = Feature(name="age", unit="years", range=(0.0, 120.0))
    texts = ("40", "50", "60", "999", "?")
    refs = [CaseRef(str(i), str(i), fields={"Alter": text}) for i, text in enumerate(texts)]
    source = DataSource(format="table", path="t.csv", columns={"age": "Alter"})  # type: ignore[arg-type]
    [field] = fields_of(refs, source, [age])
    assert describe_field(field) == (
        "age (years): 40 to 999, median 55; missing in 1 of 5 (20%); beyond 0 to 120 in 1"
    )
    assert field_notes([field]) == (
        "age: 999 in 1 records, far from all others. If it stands for a value that is not known, "
        "add it to `missing` in site.toml.",
        "age: 1 of 5 records lie beyond the study's range and count as missing. Is it in the "
        "study's unit (years)?",
    )


def test_a_field_of_zeros_is_told() -> None:
    refs = [CaseRef(str(i), str(i), fields={"chol": "0"}) for i in range(4)]
    source = DataSource(format="table", path="t.csv")  # type: ignore[arg-type]
    notes = field_notes(fields_of(refs, source, [Feature(name="chol")]))
    assert notes == ("chol: 0 in every record; is that right?",)
