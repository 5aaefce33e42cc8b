"""Updates out of proportion: the numbers, the stream, and what is remembered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from medfl.common.messages import Reply
from medfl.strategies.catalogue import STRATEGIES
from medfl.strategies.proportion import (
    Lengths,
    Proportion,
    exceeds,
    lengths_of,
    median_of,
    remember,
    remembered,
)
from medfl.strategies.strategy import ServerState


def update(site: str, length: float, control: float = 0.0) -> Reply:
    delta = {"w": np.array([0.6, -0.8], dtype=np.float32) * np.float32(length)}
    return Reply(site=site, n_cases=1, delta=delta, control={"w": np.float32([control, 0.0])})


def admitted(proportion: Proportion, *updates: Reply) -> list[str]:
    return [u.site for u in proportion.admit(updates)]


def test_lengths_are_norms_of_delta_and_control() -> None:
    assert lengths_of(update("a", 5.0, -2.0)) == Lengths(pytest.approx(5.0), pytest.approx(2.0))


def test_the_median_is_taken_field_by_field() -> None:
    assert median_of([Lengths(1, 9), Lengths(5, 1), Lengths(2, 4)]) == Lengths(2, 4)
    assert median_of([]) is None


def test_only_more_than_the_limit_exceeds_and_a_median_of_zero_says_nothing() -> None:
    assert not exceeds(Lengths(20, 0), Lengths(2, 0), limit=10)
    assert exceeds(Lengths(20.1, 0), Lengths(2, 0), limit=10)
    assert exceeds(Lengths(1, 31), Lengths(2, 3), limit=10)
    assert not exceeds(Lengths(1e9, 1e9), Lengths(0, 0), limit=10)


def test_an_update_is_compared_with_the_round_before() -> None:
    proportion = Proportion(Lengths(1.0, 0.0), limit=10)
    assert admitted(proportion, update("a", 9), update("b", 11), update("c", 0)) == ["a", "c"]
    assert proportion.left_out == ["b"]
    # All three count for the next round.
    assert proportion.median == Lengths(pytest.approx(9.0), 0.0)


def test_the_first_round_is_compared_with_itself() -> None:
    proportion = Proportion(None, limit=10)
    sites = admitted(proportion, update("bad", 1000), update("a", 1), update("b", 2))
    assert (sites, proportion.left_out) == (["a", "b"], ["bad"])
    assert proportion.median == Lengths(pytest.approx(2.0), 0.0)


def test_held_updates_come_back_bit_by_bit_and_in_order() -> None:
    sent = [update(s, length, length / 3) for s, length in zip("abc", (1.1, 2.3, 3.7), strict=True)]
    got = list(Proportion(None, limit=10).admit(iter(sent)))
    assert [u.site for u in got] == ["a", "b", "c"]
    for one, other in zip(sent, got, strict=True):
        assert one.delta["w"].tobytes() == other.delta["w"].tobytes()
        assert one.control["w"].tobytes() == other.control["w"].tobytes()


def test_later_rounds_stream_without_holding_anything() -> None:
    alive: list[str] = []

    def updates() -> Iterator[Reply]:
        for site in "abc":
            alive.append(site)
            yield update(site, 1.0)

    stream = Proportion(Lengths(1.0, 0.0), limit=10).admit(updates())
    assert next(stream).site == "a"
    assert alive == ["a"]


def test_updates_without_any_parameter_are_in_proportion() -> None:
    proportion = Proportion(None, limit=10)
    assert admitted(proportion, Reply(site="a", n_cases=1), Reply(site="b", n_cases=1)) == [
        "a",
        "b",
    ]


def test_no_update_leaves_the_earlier_median() -> None:
    earlier = Lengths(3.0, 1.0)
    assert admitted(Proportion(earlier, limit=10)) == []
    assert Proportion(earlier, limit=10).median == earlier


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_the_median_is_kept_beside_the_optimisers_own_state(name: str) -> None:
    weights = {"w": np.zeros(2, dtype=np.float32)}
    _, state = STRATEGIES[name]().server_step(weights, weights, ServerState())
    state = remember(state, Lengths(2.0, 0.5))
    assert remembered(state) == Lengths(2.0, 0.5)
    assert remembered(remember(state, None)) == Lengths(2.0, 0.5)
    STRATEGIES[name]().server_step(weights, weights, state)  # Its own slots are still there.
    assert remembered(ServerState()) is None
