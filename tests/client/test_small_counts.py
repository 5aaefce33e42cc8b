"""No number of one to four patients leaves a hospital, nor can it be had from a difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.client.data.cases import Case, Cohort
from medfl.client.hospital import Hospital, answer
from medfl.client.small_counts import Holders, fewest_of_a_class, lifted, without_small
from medfl.common.errors import PolicyRefused
from medfl.common.messages import Instruction
from medfl.common.statistics import LocalStatistics, Moments, Shared, statistics_to_plain
from medfl.common.study import Study
from medfl.common.tensors import digest


def test_what_a_small_number_is_raised_by_comes_from_the_largest() -> None:
    assert lifted({"a": 57, "b": 3}, 5, parts=True) == {"a": 55, "b": 5}
    assert lifted({"a": 57, "b": 3}, 5, parts=False) == {"a": 57, "b": 5}
    assert lifted({"a": 60, "b": 0}, 5, parts=True) == {"a": 60, "b": 0}
    assert lifted({"a": 60, "b": 5}, 5, parts=True) == {"a": 60, "b": 5}
    assert lifted({"a": 4, "b": 2}, 5, parts=True) == {"a": 5, "b": 5}


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(0, 12))
def test_nothing_small_is_left_and_the_sum_stays_where_it_can(n: list[int], smallest: int) -> None:
    made = lifted(dict(enumerate(n)), smallest, parts=True)
    assert all(value == 0 or value >= smallest for value in made.values())
    assert [value == 0 for value in made.values()] == [value == 0 for value in n]
    if max(n) >= smallest * (len(n) + 1):
        assert sum(made.values()) == sum(n)


def test_sums_over_few_values_and_rare_levels_are_not_told(
    risk_study: Callable[..., Study],
) -> None:
    found = LocalStatistics(
        60,
        class_counts=(58.0, 2.0),
        features={"x": Moments(60, 1.0, 2.0), "y": Moments(3, 7.0, 21.0)},
        levels={"z": {"often": 40, "seldom": 20, "once": 1}},
    )
    of = Holders({"x": 60, "y": 3}, {"z": {"often": 40, "seldom": 20, "once": 1}})
    told = without_small(found, risk_study(), 5, of)
    assert told.class_counts == (55.0, 5.0)
    assert told.features == {"x": Moments(60, 1.0, 2.0), "y": Moments()}
    assert told.levels == {"z": {"often": 41, "seldom": 20}}
    assert without_small(found, risk_study(), 0, of) == found


def test_a_voxel_is_no_patient(risk_study: Callable[..., Study]) -> None:
    risk, found = risk_study(), LocalStatistics(60, class_counts=(1e6, 3.0))
    segmentation = replace(risk, task=replace(risk.task, kind="segmentation"))
    assert without_small(found, segmentation, 5, Holders({}, {})) == found


def test_a_hospital_tells_its_rare_class_so(
    risk_study: Callable[..., Study], risk_hospital: Callable[..., Hospital], tmp_path: Path
) -> None:
    study = risk_study(training={"loss": "weighted_cross_entropy"})
    xs, ys = [0.1 * k for k in range(20)], [1] * 3 + [0] * 17
    asked = Instruction(kind="prepare", study_digest=study.digest, run="main", round=0)
    here: Any = risk_hospital(study, tmp_path, xs, ys, simulated=False)
    assert list(answer(here, asked).statistics["class_counts"]) == [15.0, 5.0]
    alone = replace(here, simulated=True, name="b")
    assert list(answer(alone, asked).statistics["class_counts"]) == [17.0, 3.0]


# --- words ---------------------------------------------------------------------------------------


def words_study(risk_study: Callable[..., Study], levels: list[str] | None = None) -> Study:
    features = [{"name": "x"}, {"name": "who", "kind": "category", "levels": levels}]
    return risk_study(
        record={"features": features if levels else [{"name": "x"}, features[1] | {"levels": None}]}
    )


def told_words(here: Any, study: Study, texts: list[str | None], patients: list[int]) -> Any:
    """What leaves of the column `who`, by `answer`."""
    cases = tuple(Case(f"k{i}", f"p{p}", "train") for i, p in enumerate(patients))
    rows = tuple({"x": "1.0", "who": text} for text in texts)
    targets = np.array([i % 2 for i in range(len(texts))], dtype=np.int64)
    here.__dict__["cohort"] = Cohort(cases, (), targets, rows, digest="d")
    asked = Instruction(kind="prepare", study_digest=study.digest, run="main", round=0)
    return answer(here, asked).statistics["levels"]["who"]


def test_no_word_that_few_patients_have_leaves_a_hospital(
    risk_study: Callable[..., Study], risk_hospital: Callable[..., Hospital], tmp_path: Path
) -> None:
    """37 of 37 surnames left in a free-text column."""
    study = words_study(risk_study)
    here = risk_hospital(study, tmp_path, simulated=False)
    names = [f"surname-{i}" for i in range(37)]
    assert told_words(here, study, names, list(range(37))) == {}
    texts = ["m"] * 20 + ["f"] * 15 + ["Maier", None]
    assert told_words(here, study, texts, list(range(37))) == {"m": 21, "f": 15}
    # Nine visits of one patient are one patient.
    texts = ["m"] * 20 + ["Maier"] * 9
    assert told_words(here, study, texts, [*range(20), *[20] * 9]) == {"m": 29}


def test_a_level_that_the_study_lists_may_be_rare_and_one_that_it_does_not_stays(
    risk_study: Callable[..., Study], risk_hospital: Callable[..., Hospital], tmp_path: Path
) -> None:
    study = words_study(risk_study, ["m", "f"])
    study = replace(study, record=replace(study.record, scale="federated"))
    here = risk_hospital(study, tmp_path, simulated=False)
    told = told_words(here, study, ["m"] * 20 + ["f"] * 2 + ["Maier"] * 9, list(range(31)))
    assert told == {"m": 17, "f": 5}


def test_a_sum_over_one_patient_with_many_records_stays(
    risk_study: Callable[..., Study], risk_hospital: Callable[..., Hospital], tmp_path: Path
) -> None:
    study = risk_study(record={"scale": "federated"})
    here: Any = risk_hospital(study, tmp_path, simulated=False)
    patients = [*range(20), *[20] * 9]
    cases = tuple(Case(f"k{i}", f"p{p}", "train") for i, p in enumerate(patients))
    rows = tuple({"x": None if i < 20 else "7.5"} for i in range(29))
    here.__dict__["cohort"] = Cohort(cases, (), np.zeros(29, np.int64), rows, digest="d")
    asked = Instruction(kind="prepare", study_digest=study.digest, run="main", round=0)
    assert answer(here, asked).statistics["features"]["x"]["n"] == 0
    one = tuple(Case(f"k{i}", "p", "train") for i in range(29))
    here.__dict__["cohort"] = Cohort(one, (), np.zeros(29, np.int64), rows, digest="d")
    with pytest.raises(PolicyRefused, match="1 training patients"):
        answer(here, asked)


# --- sums of two cohorts -------------------------------------------------------------------------


def test_sums_are_told_once_a_cohort_and_not_again_without_a_few(
    risk_study: Callable[..., Study], risk_hospital: Callable[..., Hospital], tmp_path: Path
) -> None:
    """The same sums before and after one withdrawal gave that patient's values."""
    study = risk_study(record={"scale": "federated"})

    def sums(n: int, first: int = 0, more: float = 0.0, of: Study = study) -> float:
        """Of a new process with these patients; patient 3 has `more`."""
        xs = [i + (more if i == 3 else 0.0) for i in range(first, first + n)]
        here: Any = risk_hospital(of, tmp_path, simulated=False)
        cases = tuple(Case(f"k{i}", f"p{i}", "train") for i in range(first, first + n))
        rows = tuple({"x": str(x)} for x in xs)
        here.__dict__["cohort"] = Cohort(cases, (), np.zeros(n, np.int64), rows, digest=f"{n}")
        asked = Instruction(kind="prepare", study_digest=of.digest, run="main", round=0)
        return float(answer(here, asked).statistics["features"]["x"]["total"])

    assert sums(20) == sums(20) == 190.0
    for change in ({"n": 19}, {"n": 21}, {"n": 24}, {"n": 20, "more": 0.5}, {"n": 20, "first": 2}):
        with pytest.raises(PolicyRefused, match="have changed since"):
            sums(**change)  # type: ignore[arg-type]
    assert sums(25) == 300.0
    # Against each cohort of before: 21 patients are few away from both.
    with pytest.raises(PolicyRefused, match="have changed since"):
        sums(24)
    # Another study of the same column is the same difference.
    other = replace(study, purpose="another")
    with pytest.raises(PolicyRefused, match="have changed since"):
        sums(19, of=other)
    # Nothing is summed, nothing is told.
    ranged = risk_study(record={"scale": "none"})
    here: Any = risk_hospital(ranged, tmp_path, list(range(19)), [0] * 19, simulated=False)
    answer(here, Instruction(kind="prepare", study_digest=ranged.digest, run="m", round=0))


def told(hospital: Hospital, study: Study) -> dict[str, float | None]:
    asked = Instruction(kind="prepare", study_digest=study.digest, run="r", seed=1)
    answer(hospital, asked)
    weights = {"1.weight": np.ones((1, 1), np.float32), "1.bias": np.zeros(1, np.float32)}
    asked = replace(
        asked, kind="finish", round=1, parts=("validation", "test"), weights=weights,
        model=digest(weights), shared=statistics_to_plain(Shared()),
    )  # fmt: skip
    return dict(answer(hospital, asked).metrics["test"])


@pytest.mark.parametrize("n_healthy", [0, 1, 4, 5])
def test_no_share_of_a_class_that_few_patients_have_leaves(
    risk_study: Callable[..., Study],
    risk_hospital: Callable[..., Hospital],
    tmp_path: Path,
    n_healthy: int,
) -> None:
    """As it was: the specificity of one healthy patient, which is what the model said of them."""
    names = ["accuracy", "specificity", "recall", "auroc", "brier"]
    study = risk_study(evaluation={"metrics": names})
    ys = [0, 1] * 5 + [1] * 20 + [0] * n_healthy
    parts = ["train"] * 10 + ["test"] * (20 + n_healthy)
    xs = [float(k % 7) for k in range(len(ys))]
    site = risk_hospital(study, tmp_path, xs, ys, parts, simulated=False)
    metrics = told(site, study)
    shown = {name for name, value in metrics.items() if value is not None}
    assert {"accuracy", "brier"} <= shown
    if n_healthy == 0:
        assert shown == {"accuracy", "brier", "recall"}
    else:
        assert (shown == set(names)) == (n_healthy >= 5)
        assert n_healthy >= 5 or shown == {"accuracy", "brier"}


def test_the_rarest_class_counts_patients_and_each_side_of_a_label(
    risk_study: Callable[..., Study],
) -> None:
    task = risk_study().task
    targets, patients = np.array([0, 0, 0, 1, 1]), ["a", "a", "b", "c", "d"]
    assert fewest_of_a_class(task, targets, patients) == 2
    assert fewest_of_a_class(task, targets[:3], patients[:3]) == 2
    assert fewest_of_a_class(task, targets[:0], []) == 0
    several = replace(task, classes=["x", "y"], multi_label=True)
    labels = np.array([[1, 0], [0, 0], [0, 0], [0, 0]])
    assert fewest_of_a_class(several, labels, ["a", "b", "c", "c"]) == 1
