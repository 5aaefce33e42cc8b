"""How long an answer is waited for."""

from __future__ import annotations

import pytest

from medfl.server.patience import Patience


def test_the_first_answer_may_take_what_a_person_allowed() -> None:
    assert Patience(3600.0).allows_s("a", "round") == 3600.0


def test_later_ones_may_take_three_times_the_longest_of_the_last_five() -> None:
    patience = Patience(3600.0)
    for seconds in (500.0, 20.0, 100.0, 20.0, 20.0, 20.0):
        patience.answered("a", "round", seconds)
    assert patience.allows_s("a", "round") == 300.0
    assert patience.allows_s("a", "finish") == 3600.0, "another question is another time"


@pytest.mark.parametrize(("took", "allowed"), [(0.1, 120.0), (2000.0, 3600.0)])
def test_never_less_than_two_minutes_and_never_more_than_allowed(
    took: float, allowed: float
) -> None:
    patience = Patience(3600.0)
    patience.answered("a", "round", took)
    assert patience.allows_s("a", "round") == allowed


def test_a_short_deadline_of_a_person_stands() -> None:
    patience = Patience(5.0)
    patience.answered("a", "round", 1.0)
    assert patience.allows_s("a", "round") == 5.0


def test_a_site_without_an_answer_has_what_the_others_have() -> None:
    patience = Patience(3600.0)
    patience.answered("a", "round", 100.0)
    assert patience.allows_s("b", "round") == 300.0


def test_a_site_that_became_slow_gets_one_longer_chance() -> None:
    patience = Patience(3600.0)
    for name in "ab":
        patience.answered(name, "round", 100.0)
    patience.answered("slow", "round", 50.0)
    allowed = []
    for _ in range(4):
        allowed.append(patience.allows_s("slow", "round"))
        patience.missed("slow", "round")
    assert allowed == [150.0, 300.0, 300.0, 300.0]
    patience.answered("slow", "round", 200.0)
    assert patience.allows_s("slow", "round") == 600.0
