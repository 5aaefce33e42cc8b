"""No number of one to four patients leaves a hospital, nor can it be had from a difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from medfl.client.hospital import Hospital, answer
from medfl.client.small_counts import lifted, without_small
from medfl.common.messages import Instruction
from medfl.common.statistics import LocalStatistics, Moments
from medfl.common.study import Study


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
    told = without_small(found, risk_study(), 5)
    assert told.class_counts == (55.0, 5.0)
    assert told.features == {"x": Moments(60, 1.0, 2.0), "y": Moments()}
    assert told.levels == {"z": {"often": 36, "seldom": 20, "once": 5}}
    assert without_small(found, risk_study(), 0) == found


def test_a_voxel_is_no_patient(risk_study: Callable[..., Study]) -> None:
    risk, found = risk_study(), LocalStatistics(60, class_counts=(1e6, 3.0))
    segmentation = replace(risk, task=replace(risk.task, kind="segmentation"))
    assert without_small(found, segmentation, 5) == found


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
