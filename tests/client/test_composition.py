"""What overlapping cohorts add up to, by hand and by brute force over every patient."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.client.composition import (
    Charge,
    Limit,
    heaviest,
    largest_epsilon,
    most_steps,
    per_patient,
    spent,
)
from medfl.common import accounting

A, B = (4.0, 0.5, 20), (2.0, 0.1, 30)


def ids(*numbers: int) -> np.ndarray:
    return np.array(sorted(numbers), dtype=np.uint64)


def test_disjoint_cohorts_pay_in_parallel_and_overlapping_ones_together() -> None:
    apart = {"x": ids(1, 2), "y": ids(3)}
    uses = [("x", A), ("y", B)]
    assert sorted(heaviest(uses, apart, ids(1, 2, 3))) == sorted([[A], [B]])
    overlap = {"x": ids(1, 2), "y": ids(2, 3)}
    assert heaviest(uses, overlap, ids(1, 2, 3)) == [[A, B]]
    assert heaviest(uses, overlap, ids(1)) == [[A]]
    assert heaviest(uses, overlap, ids(9)) == [[]]
    assert heaviest([], {}, ids(1)) == [[]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=4))
def test_the_heaviest_history_is_that_of_the_worst_off_patient(cohorts: list[set[int]]) -> None:
    sets = {str(i): ids(*c) for i, c in enumerate(cohorts)}
    # Powers of two in the steps: each subset of the uses has its own sum.
    uses = [(str(i), (5.0, 0.5, 2**i)) for i in range(len(cohorts))]
    worst = max(sum(2**i for i, c in enumerate(cohorts) if p in c) for p in range(6))
    found = heaviest(uses, sets, ids(*range(6)))
    assert max(sum(n for _, _, n in history) for history in found) == worst


def charge(unit: str, sigma: float = 4.0, q: float = 0.1) -> Charge:
    return Charge("d", "s", "main", "training", 1, sigma, q, 5, unit)  # type: ignore[arg-type]


def test_records_cost_a_patient_with_several_of_them_more() -> None:
    assert per_patient(charge("patient"), 50) == (4.0, 0.1, 5)
    assert per_patient(charge("record"), 1) == (4.0, 0.1, 5)
    sigma, q, steps = per_patient(charge("record"), 2)
    assert (sigma, steps) == (2.0, 5)
    assert q == pytest.approx(0.19)
    assert per_patient(charge("record", q=1.0), 3)[1] == 1.0


def test_what_fits_is_the_most_that_does() -> None:
    limit = Limit(1.9, 1e-3)
    fits = most_steps([[A]], (4.0, 0.5, 10), limit)
    assert spent([[A, (4.0, 0.5, fits)]], 1e-3) <= 1.9 < spent([[A, (4.0, 0.5, fits + 1)]], 1e-3)
    assert most_steps([[]], (4.0, 0.5, 3), limit) == 3
    most = largest_epsilon([[A]], (4.0, 0.5, 10), limit, 1e-3)
    sigma = accounting.noise_multiplier_for(most, 1e-3, 0.5, 10)
    assert spent([[A, (sigma, 0.5, 10)]], 1e-3) <= 1.9 * 1.001
    assert 0.2 < most < 1.9
    assert largest_epsilon([[A, A, A]], (4.0, 0.5, 10), limit, 1e-3) == 0.0
