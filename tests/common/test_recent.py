"""What was made of the latest object is made once, and of no other."""

from __future__ import annotations

from medfl.common.recent import Recent


def test_an_object_that_is_asked_about_again_is_not_made_anew() -> None:
    made: list[list[int]] = []

    def make(of: list[int]) -> int:
        made.append(of)
        return sum(of)

    recent, one, equal = Recent(make), [1, 2], [1, 2]
    assert [recent(of) for of in (one, one, equal, equal, one)] == [3] * 5
    assert [of is one for of in made] == [True, False, True]


def test_what_was_made_is_let_go_of_before_the_next_is_made() -> None:
    kept: list[object] = []
    recent: Recent[str, str] = Recent(lambda of: kept.append(recent._kept) or of)  # type: ignore[func-returns-value]
    assert [recent("a"), recent("b")] == ["a", "b"]
    assert kept == [None, None]
