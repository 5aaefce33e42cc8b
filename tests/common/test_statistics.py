"""Sums of several hospitals give the mean and sd of all their cases together."""

from __future__ import annotations

import json
import random
from itertools import permutations

import numpy as np
import pytest

from medfl.common.errors import FederationError
from medfl.common.statistics import (
    LocalStatistics,
    Moments,
    Shared,
    local_from_plain,
    merge,
    shared_from_plain,
    statistics_to_plain,
)


def moments(values: np.ndarray) -> Moments:
    return Moments(float(values.size), float(values.sum()), float(np.square(values).sum()))


def some_parts(seed: int) -> tuple[list[LocalStatistics], np.ndarray]:
    """Five unequal hospitals and all of their values in one array."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(-3.0, 20.0, size=n) for n in (2, 7, 40, 300, 1)]
    parts = [
        LocalStatistics(
            n_cases=v.size,
            class_counts=(float(v.size), 1 / 3),
            features={"age": moments(v)},
            levels={"sex": {"f": i, "m": 1}},
            intensity=(moments(v), moments(v * 0.1)),
        )
        for i, v in enumerate(values)
    ]
    return parts, np.concatenate(values)


def test_mean_and_sd_by_hand() -> None:
    shared = merge(
        [
            LocalStatistics(n_cases=2, features={"x": moments(np.array([-1.0, 3.0]))}),
            LocalStatistics(n_cases=1, features={"x": moments(np.array([4.0]))}),
        ]
    )
    assert shared.means["x"] == 2.0
    assert shared.sds["x"] == pytest.approx(7.0**0.5)  # (9 + 1 + 4) / (3 - 1)


@pytest.mark.parametrize("seed", range(5))
def test_merged_parts_equal_numpy_over_everybodys_values(seed: int) -> None:
    parts, together = some_parts(seed)
    shared = merge(parts)
    assert shared.means["age"] == pytest.approx(together.mean(), rel=1e-12)
    assert shared.sds["age"] == pytest.approx(together.std(ddof=1), rel=1e-12)
    assert shared.channel_means[1] == pytest.approx(together.mean() * 0.1, rel=1e-12)
    assert shared.channel_sds[0] == pytest.approx(together.std(ddof=1), rel=1e-12)
    assert shared.class_counts == (350.0, pytest.approx(5 / 3))


def test_the_order_of_hospitals_does_not_change_one_bit() -> None:
    parts, _ = some_parts(1)
    everyone = merge(parts)
    assert all(merge(order) == everyone for order in permutations(parts))


def test_many_tenths_add_up_in_every_order() -> None:
    parts = [
        LocalStatistics(n_cases=1, features={"x": Moments(1.0, 0.1 * 7**k, 1.0)}) for k in range(9)
    ]
    expected = merge(parts)
    for seed in range(50):
        random.Random(seed).shuffle(parts)
        assert merge(parts) == expected


def test_a_value_that_never_varies_is_not_divided_by_zero() -> None:
    same = LocalStatistics(n_cases=3, features={"x": moments(np.array([5.0, 5.0, 5.0]))})
    assert merge([same]).sds["x"] == 1.0
    assert merge([LocalStatistics(n_cases=1, features={"x": Moments(1, 5, 25)})]).sds["x"] == 1.0
    assert merge([LocalStatistics(n_cases=0, features={"x": Moments()})]).means["x"] == 0.0


def test_a_feature_that_one_hospital_lacks_is_taken_from_the_others() -> None:
    has = LocalStatistics(n_cases=2, features={"x": moments(np.array([1.0, 3.0]))})
    lacks = LocalStatistics(n_cases=9)
    assert merge([has, lacks]).means == {"x": 2.0}


def test_levels_are_united_and_sorted_and_their_columns_have_moments() -> None:
    one = LocalStatistics(n_cases=3, levels={"sex": {"m": 2, "f": 1}})
    two = LocalStatistics(n_cases=1, levels={"sex": {"x": 1}})
    shared = merge([one, two])
    column = np.array([1.0, 1.0, 0.0, 0.0])  # "m" among the four records
    assert shared.levels == {"sex": ("f", "m", "x")}
    assert shared.means["sex=m"] == column.mean()
    assert shared.sds["sex=m"] == pytest.approx(column.std(ddof=1))


def test_one_private_hospital_makes_the_study_private() -> None:
    open_site, private_site = LocalStatistics(n_cases=1), LocalStatistics(n_cases=1, private=True)
    assert merge([open_site, private_site]).private
    assert not merge([open_site, open_site]).private


@pytest.mark.parametrize("what", ["class_counts", "intensity"])
def test_hospitals_that_count_different_things_cannot_be_added(what: str) -> None:
    value = {"class_counts": 1.0, "intensity": Moments(1, 1, 1)}[what]
    two = LocalStatistics(n_cases=1, **{what: (value, value)})
    three = LocalStatistics(n_cases=1, **{what: (value, value, value)})
    with pytest.raises(FederationError, match=r"2 and 3 (classes|image channels)\. Compare") as e:
        merge([two, three, two])
    assert e.value.exit_code == 6


def test_both_kinds_survive_json_exactly() -> None:
    parts, _ = some_parts(3)
    local = parts[2]
    assert local_from_plain(json.loads(json.dumps(statistics_to_plain(local)))) == local
    shared = merge(parts)
    assert shared_from_plain(json.loads(json.dumps(statistics_to_plain(shared)))) == shared


def test_nothing_from_nobody() -> None:
    assert merge([]) == Shared()


def test_unknown_keys_on_the_wire_are_refused() -> None:
    plain = statistics_to_plain(LocalStatistics(n_cases=1)) | {"patients": ["x"]}
    with pytest.raises(TypeError, match="patients"):
        local_from_plain(plain)
