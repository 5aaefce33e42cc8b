"""What was made of the latest object is made once, and of no other."""

from __future__ import annotations

from medfl.common.latest import Latest


def test_an_object_that_is_asked_about_again_is_not_made_anew() -> None:
    made: list[list[int]] = []

    def make(of: list[int]) -> int:
        made.append(of)
        return sum(of)

    latest, one, equal = Latest(make), [1, 2], [1, 2]
    assert [latest(of) for of in (one, one, equal, equal, one)] == [3] * 5
    assert [of is one for of in made] == [True, False, True]


def test_what_was_made_is_let_go_of_before_the_next_is_made() -> None:
    kept: list[object] = []
    latest: Latest[str, str] = Latest(lambda of: kept.append(latest._kept) or of)  # type: ignore[func-returns-value]
    assert [latest("a"), latest("b")] == ["a", "b"]
    assert kept == [None, None]
