"""One live client a hospital, for the calls and for the tunnel alike."""

from __future__ import annotations

import pytest

from medfl.common.coordination import LEASE_S
from medfl.common.errors import PolicyRefused
from medfl.server.sessions import Sessions


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def sessions(now: list[float]) -> Sessions:
    return Sessions(lambda: now[0])


def test_who_was_greeted_may_use_the_tunnel_and_nobody_else(sessions: Sessions) -> None:
    sessions.begin("north", "first")
    assert sessions.holds("north", "first", arriving=True)
    assert sessions.holds("north", "first", arriving=False)
    assert not sessions.holds("north", "second", arriving=True)
    assert sessions.holds("south", "second", arriving=True)


def test_a_place_is_free_after_the_lease_for_calls_and_tunnel_at_once(
    sessions: Sessions, now: list[float]
) -> None:
    sessions.begin("north", "first")
    now[0] += LEASE_S / 2
    assert sessions.holds("north", "first", arriving=False)  # heard, so the lease begins anew
    now[0] += LEASE_S - 1
    with pytest.raises(PolicyRefused, match="try again in 1 s"):
        sessions.begin("north", "second")
    assert not sessions.holds("north", "second", arriving=True)
    now[0] += 1
    assert sessions.holds("north", "second", arriving=True)
    with pytest.raises(PolicyRefused):
        sessions.touch("north", "first")


def test_a_silent_client_does_not_take_its_place_back_by_going_on(
    sessions: Sessions, now: list[float]
) -> None:
    sessions.begin("north", "first")
    now[0] += 2 * LEASE_S
    assert not sessions.holds("north", "second", arriving=False)
    sessions.begin("north", "second")
    assert not sessions.holds("north", "first", arriving=False)


def test_after_a_restart_of_the_coordinator_clients_go_on(sessions: Sessions) -> None:
    assert sessions.holds("north", "first", arriving=False)
    with pytest.raises(PolicyRefused):
        sessions.begin("north", "second")


def test_a_goodbye_frees_the_place_of_its_own_session_only(sessions: Sessions) -> None:
    sessions.begin("north", "first")
    sessions.end("north", "second")
    assert not sessions.holds("north", "second", arriving=True)
    sessions.end("north", "first")
    assert sessions.holds("north", "second", arriving=True)
