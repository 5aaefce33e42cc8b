"""Records become the same numbers at every hospital."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medfl.common.codes import folded, level, number
from medfl.common.errors import CaseError
from medfl.common.records import columns, encode, level_counts, moments
from medfl.common.statistics import LocalStatistics, Moments, Shared, merge
from medfl.common.study import Feature, RecordInput, load_study

AGE = Feature(name="age", range=(20.0, 60.0))
PAIN = Feature(name="pain", kind="category", levels=["3", "1", "2"])
OPEN_PAIN = Feature(name="pain", kind="category")


def test_a_category_becomes_one_column_a_level_without_the_first() -> None:
    record = RecordInput(features=[PAIN], scale="none")
    assert columns(record, Shared()) == ("pain=2", "pain=3")
    rows = [{"pain": "1"}, {"pain": "2"}, {"pain": "3.0"}]
    assert encode(record, rows, Shared()).tolist() == [[0, 0], [1, 0], [0, 1]]


def test_a_range_becomes_minus_one_to_one_and_beyond_is_missing_not_the_end() -> None:
    # 100 and -5 of 20..60 were 1 and -1, the oldest and the youngest; missing is the middle, 0.
    record = RecordInput(features=[AGE], scale="range", missing="indicator")
    rows = [{"age": t} for t in ("20", "40", "60", "100", "-5", "50")]
    encoded = encode(record, rows, Shared())
    assert encoded.tolist() == [[-1, 0], [0, 0], [1, 0], [0, 1], [0, 1], [0.5, 0]]


def test_the_ends_of_the_scale_may_lie_within_the_plausible_range() -> None:
    # 20..60 become -1..1; 80 is plausible and lies at 2; 121 is not.
    age = Feature(name="age", range=(0.0, 120.0), scale_range=(20.0, 60.0))
    record = RecordInput(features=[age], scale="range", missing="mean")
    rows = [{"age": t} for t in ("20", "60", "80", "121")]
    assert encode(record, rows, Shared())[:, 0].tolist() == [-1, 1, 2, 0]


def test_numbers_beyond_the_range_are_in_no_sum() -> None:
    # 30 + 50 over two; 999 would have made the mean 359.7.
    rows = [{"age": t} for t in ("30", "50", "999")]
    sums = moments(RecordInput(features=[AGE], scale="federated"), rows)
    assert sums["age"] == Moments(2, 80, 3400)


def test_under_range_a_category_becomes_half_and_minus_half() -> None:
    record = RecordInput(features=[PAIN], scale="range")
    assert encode(record, [{"pain": "1"}, {"pain": "3"}], Shared()).tolist() == [
        [-0.5, -0.5],
        [-0.5, 0.5],
    ]


def test_federated_scaling_by_hand() -> None:
    # 2 and 4 at one hospital, 6 at the other: mean 4, sd 2 with n - 1. Levels a, a, b.
    record = RecordInput(features=[Feature(name="x"), OPEN_PAIN], scale="federated")
    here = [{"x": "2", "pain": "a"}, {"x": "4", "pain": "a"}]
    there = [{"x": "6", "pain": "b"}]
    parts = [
        LocalStatistics(
            len(rows), features=moments(record, rows), levels=level_counts(record, rows)
        )
        for rows in (here, there)
    ]
    shared = merge(parts)
    assert columns(record, shared) == ("x", "pain=b")
    # The 0/1 column of b is 0, 0, 1: mean 1/3, sd sqrt(1/3).
    expected = [[-1, -1 / 3 * math.sqrt(3)], [0, -1 / 3 * math.sqrt(3)]]
    assert encode(record, here, shared) == pytest.approx(np.array(expected), rel=1e-6)
    assert encode(record, there, shared) == pytest.approx(np.array([[1, 2 / 3 * math.sqrt(3)]]))


def test_moments_by_hand_leave_missing_values_out() -> None:
    record = RecordInput(features=[Feature(name="x")])
    assert moments(record, [{"x": "-2"}, {"x": None}, {"x": "3"}]) == {"x": Moments(2, 1, 13)}


@pytest.mark.parametrize("scale", ["federated", "range", "none"])
def test_a_missing_value_is_zero_after_scaling(scale: str) -> None:
    record = RecordInput(features=[AGE, PAIN], scale=scale, missing="mean")  # type: ignore[arg-type]
    shared = Shared(means={"age": 50.0, "pain=2": 0.5}, sds={"age": 5.0, "pain=2": 0.5})
    assert not encode(record, [{"age": None, "pain": None}], shared).any()


def test_an_indicator_column_says_what_is_missing() -> None:
    record = RecordInput(features=[AGE, PAIN], scale="range", missing="indicator")
    assert columns(record, Shared()) == ("age", "age?", "pain=2", "pain=3", "pain?")
    rows = [{"age": None, "pain": "2"}, {"age": "60", "pain": None}]
    assert encode(record, rows, Shared()).tolist() == [[0, 1, 0.5, -0.5, 0], [1, 0, 0, 0, 1]]


def test_a_level_that_no_training_record_has_counts_as_missing() -> None:
    """A rare value in a test record must not keep the whole hospital out."""
    record = RecordInput(features=[OPEN_PAIN], scale="none")
    shared = Shared(levels={"pain": ("1", "2")})
    assert encode(record, [{"pain": "2"}, {"pain": "9"}], shared).tolist() == [[1], [0]]


def test_no_records_make_no_rows_of_the_right_width() -> None:
    record = RecordInput(features=[AGE, PAIN], scale="range")
    assert encode(record, [], Shared()).shape == (0, 3)


@pytest.mark.parametrize(
    "text", ["", "x", "nan", "inf", "-inf", "1_2", "3,5", "\u0663", "0x10", "1e999"]
)
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(CaseError):
        number(text)


def test_a_code_is_compared_as_it_is_written() -> None:
    # As float both codes of eighteen digits are 123456789012345680, and 1E50 an integer.
    codes = ("123456789012345678", "123456789012345679", "007", "7", "1E50", "2.5", "-0")
    assert [level(code) for code in codes] == list(codes)


def test_a_spreadsheets_point_zero_is_no_part_of_a_code() -> None:
    assert [level(t) for t in ("3", "3.0", " 3 ", "0.00", "a ")] == ["3", "3", "3", "0", "a"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("0012", "12"), ("P-007", "p-7"), ("M\u00fcller", "Mu\u0308ller"), ("a  b", "ab")],
)
def test_what_only_looks_alike_is_told_and_not_joined(one: str, other: str) -> None:
    assert folded(one) == folded(other)
    assert level(one) != level(other)


def test_what_differs_does_not_look_alike() -> None:
    assert len({folded(t) for t in ("10", "1", "100", "1.10", "1.1", "0")}) == 6


def test_heart_disease_has_the_thirteen_columns_of_flamby(root: Path) -> None:
    """FLamby's are those of pandas.get_dummies without the first: it names 13 inputs."""
    study = load_study(root / "simulations/studies/heart_disease.toml")
    assert study.record is not None
    shared = Shared(
        levels={"chest_pain": ("1", "2", "3", "4"), "resting_ecg": ("0", "1", "2")},
    )
    assert columns(study.record, shared) == (
        "age",
        "sex",
        "chest_pain=2",
        "chest_pain=3",
        "chest_pain=4",
        "resting_pressure",
        "cholesterol",
        "fasting_sugar",
        "resting_ecg=1",
        "resting_ecg=2",
        "max_heart_rate",
        "exercise_angina",
        "st_depression",
    )


def test_heart_diseases_means_are_those_of_all_training_records(
    root: Path, public_data: Callable[[str], Path], tmp_path: Path
) -> None:
    from medfl.client.encoding import local_statistics
    from medfl.simulations.sites import find_hospitals

    study = load_study(root / "simulations/studies/heart_disease.toml")
    sites = find_hospitals(study, public_data("uci_heart_disease"), tmp_path)
    cohorts = [site.cohort(study) for site in sites]
    shared = merge(local_statistics(study, c, private=False) for c in cohorts)
    ages = [float(str(c.records[i]["age"])) for c in cohorts for i in c.positions("train")]
    assert shared.means["age"] == pytest.approx(np.mean(ages))
    assert shared.sds["age"] == pytest.approx(np.std(ages, ddof=1))
