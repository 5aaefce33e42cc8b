"""Records become the same numbers at every hospital."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medfl.common.errors import CaseError
from medfl.common.records import columns, encode, level, level_counts, moments, number
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


def test_a_range_becomes_minus_one_to_one_and_beyond_is_cut() -> None:
    record = RecordInput(features=[AGE], scale="range")
    rows = [{"age": t} for t in ("20", "40", "60", "100", "-5", "50")]
    assert encode(record, rows, Shared())[:, 0].tolist() == [-1, 0, 1, 1, -1, 0.5]


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


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf"])
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(CaseError):
        number(text)


def test_levels_have_one_spelling() -> None:
    assert [level(t) for t in ("3", "3.0", " 3 ", "2.5", "a ", "-0")] == [
        "3",
        "3",
        "3",
        "2.5",
        "a",
        "0",
    ]


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
