"""Every case and every patient in exactly one site, whatever the rule."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from medfl.client.data.cases import CaseRef
from medfl.common.errors import ConfigError
from medfl.common.study import Partition
from medfl.simulations.partition import partition


def cases(n_patients: int = 40, each: int = 3) -> list[CaseRef]:
    """Patient p has `each` cases, label p % 4, ward a, B or rare, and images of p + 1 rows."""
    wards = ["A", "b", "b", "C d"] if n_patients >= 4 else ["A"]
    return [
        CaseRef(
            f"c{p}-{i}",
            f"p{p:02d}",
            fields={"label": str(p % 4), "ward": "rare" if p == 0 else wards[p % 4]},
            size=(p + 1, 2),
        )
        for i in range(each)
        for p in range(n_patients)
    ]


def how(kind: str, **more: Any) -> Partition:
    return Partition(kind=kind, **({"sites": 5} | more))  # type: ignore[arg-type]


ALL = [
    how("iid"),
    how("label_skew"),
    how("label_skew", alpha=0.001),
    how("label_skew", alpha=1000.0),
    how("quantity_skew"),
    how("quantity_skew", alpha=0.001),
    how("quantity_skew", sites=40, alpha=0.01),
    how("size"),
    Partition(kind="column", column="ward"),
    Partition(kind="column", column="ward", merge_below=4),
]


@pytest.mark.parametrize("rule", ALL, ids=lambda p: f"{p.kind}-{p.alpha}-{p.sites}")
def test_every_case_and_every_patient_is_in_exactly_one_site(rule: Partition) -> None:
    given = cases()
    parts = partition(given, rule)
    assert Counter(c for ids in parts.values() for c in ids) == Counter(c.case_id for c in given)
    patient = {c.case_id: c.patient for c in given}
    owners = [{patient[c] for c in ids} for ids in parts.values()]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 40
    if rule.sites is not None:
        assert len(parts) == rule.sites


@pytest.mark.parametrize("kind", ["iid", "label_skew", "quantity_skew"])
def test_the_seed_decides(kind: str) -> None:
    assert partition(cases(), how(kind, seed=1)) == partition(cases(), how(kind, seed=1))
    assert partition(cases(), how(kind, seed=1)) != partition(cases(), how(kind, seed=2))


@pytest.mark.parametrize("rule", ALL[:8], ids=lambda p: f"{p.kind}-{p.alpha}-{p.sites}")
def test_the_order_of_the_cases_does_not_decide(rule: Partition) -> None:
    forward, backward = partition(cases(), rule), partition(cases()[::-1], rule)
    assert {n: set(ids) for n, ids in forward.items()} == {
        n: set(ids) for n, ids in backward.items()
    }


def test_equal_parts_differ_by_one_patient_at_most() -> None:
    sizes = [len(ids) for ids in partition(cases(43, each=1), how("iid")).values()]
    assert sorted(sizes) == [8, 8, 9, 9, 9]


def labels_by_site(alpha: float) -> Any:
    parts = partition(cases(400, each=1), how("label_skew", alpha=alpha))
    label = {c.case_id: int(c.fields["label"]) for c in cases(400, each=1)}
    return np.array([np.bincount([label[c] for c in ids], minlength=4) for ids in parts.values()])


def test_a_large_alpha_mixes_and_a_small_one_separates() -> None:
    mixed, apart = labels_by_site(10_000), labels_by_site(0.001)
    assert np.all(np.abs(mixed - 20) <= 4)
    # All but a few patients of a class lie in one site.
    assert np.all(apart.max(axis=0) >= 90)


def test_sizes_may_differ_much() -> None:
    sizes = [len(ids) for ids in partition(cases(400, 1), how("quantity_skew", alpha=0.2)).values()]
    assert max(sizes) > 3 * min(sizes)
    assert min(sizes) >= 1


def test_by_size_the_first_site_has_the_smallest_images() -> None:
    parts = partition(cases(10, each=1), how("size", sites=2))
    assert parts == {
        "site-1": [f"c{p}-0" for p in range(5)],
        "site-2": [f"c{p}-0" for p in range(5, 10)],
    }


def test_names_sort_like_numbers() -> None:
    names = list(partition(cases(), how("iid", sites=12)))
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("site-01", "site-12")


def test_by_column_small_sites_are_merged() -> None:
    parts = partition(cases(), Partition(kind="column", column="ward"))
    assert {n: len(ids) for n, ids in parts.items()} == {"rare": 3, "a": 27, "b": 60, "c-d": 30}
    merged = partition(cases(), Partition(kind="column", column="ward", merge_below=28))
    assert {n: len(ids) for n, ids in merged.items()} == {"b": 60, "c-d": 30, "rest": 30}


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no column 'clinic'.*label, ward"):
        partition(cases(), Partition(kind="column", column="clinic"))


def test_more_sites_than_patients_is_an_error() -> None:
    with pytest.raises(ConfigError, match="41 sites of 40 patients"):
        partition(cases(), how("iid", sites=41))
    assert len(partition(cases(), how("iid", sites=40))) == 40


def test_sizes_that_nobody_knows_are_an_error() -> None:
    unknown = [CaseRef("a", "a"), CaseRef("b", "b", size=(2, 2))]
    with pytest.raises(ConfigError, match="1 patients"):
        partition(unknown, how("size", sites=2))


def test_a_patient_in_two_wards_belongs_to_the_one_with_most_cases() -> None:
    wards = {"a": "x", "b": "y", "c": "y"}
    torn = [CaseRef(i, "p", fields={"ward": w}) for i, w in wards.items()]
    other = CaseRef("d", "q", fields={"ward": "x"})
    parts = partition([*torn, other], Partition(kind="column", column="ward"))
    assert parts == {"y": ["a", "b", "c"], "x": ["d"]}
    equal = partition(torn[:2], Partition(kind="column", column="ward"))
    assert equal == {"x": ["a", "b"]}


def test_sites_below_a_size_are_left_out() -> None:
    parts = partition(cases(), Partition(kind="column", column="ward", drop_below=28))
    assert set(parts) == {"b", "c-d"}
    with pytest.raises(ConfigError, match="no site has 99 cases"):
        partition(cases(), Partition(kind="column", column="ward", drop_below=99))
