"""Cases 6 to 8, 10, 11, 29 and 30: what can happen between a hospital and the coordinator.

Two hospitals, each behind its own chaos proxy; the coordinator can be told to answer nonsense.
"""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from harness.world import World, federation_of, same, seconds

CUT = "south"
Seen = Callable[[str], None]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One run without any fault is done: its model is what the others must reach."""
    folder = tmp_path_factory.mktemp("network")
    canary = socket.create_server(("127.0.0.1", 0))
    to = f"http://127.0.0.1:{canary.getsockname()[1]}"
    server = {
        "garbage": str(folder / "garbage"),
        "redirect": {"file": str(folder / "redirect"), "to": to},
    }
    made = federation_of(
        folder / "world", ("north", CUT), {"rounds": 4, "min_sites": 2}, server=server
    )
    made.canary = canary  # type: ignore[attr-defined]
    made.clean = made.run()  # type: ignore[attr-defined]
    made.ends(made.clean)  # type: ignore[attr-defined]
    yield made
    canary.close()
    made.close()


def whole(world: World, run: str) -> None:
    """Everybody was in every round, and the model is the one of a run without faults."""
    world.ends(run, 150)
    assert world.left_out(run) == [{}] * 5
    assert same(world.model(run), world.model(world.clean))  # type: ignore[attr-defined]


@pytest.mark.case(8, "connections reset and refused for 5 s from round 1 on")
def test_a_short_cut_leaves_no_trace(shared: World, seen: Seen) -> None:
    proxy = shared.sites[CUT].proxy
    run = shared.run()
    shared.reached(run, 1)
    proxy.cut()
    time.sleep(5)
    proxy.mend()
    whole(shared, run)
    longest = max(r["seconds"] for r in shared.rounds(run))
    seen(f"both in all rounds, the longest took {longest:.1f} s; the model is the same bit by bit")


@pytest.mark.case(6, "SuperLink's SQLite locked for 8 s by another process's exclusive lock")
def test_a_locked_database_is_waited_for(shared: World, seen: Seen) -> None:
    run = shared.run()
    shared.reached(run, 1)
    (database,) = (shared.fed / "engine").glob("*.db")
    since = time.monotonic()
    with closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        time.sleep(8)
        lock.execute("ROLLBACK")
    shared.ends(run, 150)
    assert shared.left_out(run) == [{}] * 5
    assert same(shared.model(run), shared.model(shared.clean))  # type: ignore[attr-defined]
    seen(f"both in all rounds, same model bit by bit; {seconds(since)} from the lock to the end")


@pytest.mark.timeout(800)
@pytest.mark.case(7, "every answer to a node is 200 with bytes that are no protobuf, for 3 s")
def test_garbage_does_not_leave_a_zombie(shared: World, seen: Seen) -> None:
    assert shared.server is not None
    garbage = shared.folder.parent / "garbage"
    garbage.touch()
    time.sleep(3)
    garbage.unlink()
    since = time.monotonic()
    run = shared.run(deadline=150)
    whole(shared, run)
    for site in shared.sites.values():
        assert site.process is not None
        assert site.process.popen.poll() is None
    seen(f"both counted in all rounds of a run begun at once, over after {seconds(since)}")


@pytest.mark.case(30, "every answer to a node is a 307 to another port of this machine, for 3 s")
def test_nobody_is_led_elsewhere(shared: World, seen: Seen) -> None:
    knocked: list[bool] = []
    canary: socket.socket = shared.canary  # type: ignore[attr-defined]

    def listen() -> None:
        with suppress(OSError):
            canary.settimeout(60)
            canary.accept()
            knocked.append(True)

    watcher = threading.Thread(target=listen, daemon=True)
    watcher.start()
    elsewhere = shared.folder.parent / "redirect"
    elsewhere.touch()
    time.sleep(3)
    elsewhere.unlink()
    run = shared.run(deadline=150)
    whole(shared, run)
    assert not knocked
    seen("nobody knocked there; both counted in all rounds of the next run")


@pytest.mark.case(10, "open connections whose bytes go nowhere, deadline 6 s")
def test_a_half_open_line_costs_the_deadline(shared: World, seen: Seen) -> None:
    proxy = shared.sites[CUT].proxy
    shared.publish("hole", rounds=6, min_sites=1)
    for site in shared.sites.values():
        site.approve("hole")
    run = shared.run("hole", deadline=6)
    shared.reached(run, 1)
    proxy.black_hole()
    try:
        shared.ends(run)
    finally:
        proxy.mend()
    records = shared.rounds(run)
    late = [r["left_out"][CUT] for r in records if CUT in r["left_out"]]
    assert late
    assert all(r["seconds"] < 20 for r in records[1:])
    since = time.monotonic()
    whole(shared, shared.run(deadline=100))
    seen(
        f"left out as {late}, no exchange longer than "
        f"{max(r['seconds'] for r in records[1:]):.1f} s; after the mend both counted in "
        f"a run of {seconds(since)}"
    )


@pytest.mark.case(10, "the hospital's end of TCP closed alone (half-close) in a run")
def test_a_half_closed_line_is_opened_anew(shared: World, seen: Seen) -> None:
    run = shared.run()
    shared.reached(run, 1)
    shared.sites[CUT].proxy.half_close()
    whole(shared, run)
    seen("both in all rounds, same model")


@pytest.mark.case(29, "the address leads to another federation's gateway for 8 s, then back")
def test_a_wrong_authority_is_refused_until_the_right_one_is_back(
    shared: World, seen: Seen
) -> None:
    other = World(shared.folder.parent / "other")
    proxy, site = shared.sites[CUT].proxy, shared.sites[CUT]
    try:
        other.init()
        other.serve()
        assert site.process is not None
        line = len(site.process.lines)
        proxy.target = other.address
        proxy.reset()
        site.process.wait_for("is not the coordinator of this federation", 60, line)
        proxy.target = shared.address
        site.process.wait_for("Connected again", 60, line)
    finally:
        proxy.target = shared.address
        other.close()
    whole(shared, shared.run())
    assert not [e for e in other.audit() if e["about"].get("site") == CUT]
    seen("said what answers there is not the coordinator, kept trying, connected again by itself")


@pytest.mark.campaign
@pytest.mark.case(11, "64 kbit/s upwards, an update of 40 kB a round")
def test_a_slow_line_is_waited_for(shared: World, seen: Seen) -> None:
    proxy = shared.sites[CUT].proxy
    shared.publish(
        "big", rounds=2, min_sites=2, model="mlp", options="options = { hidden = [2500] }"
    )
    for site in shared.sites.values():
        site.approve("big")
    proxy.slow(up_bytes_s=8000)
    before = proxy.passed_up
    try:
        run = shared.run("big", deadline=120)
        over = shared.over(run, 280)
    finally:
        proxy.mend()
    assert over.state == "done", over
    records = shared.rounds(run)
    assert [r["left_out"] for r in records] == [{}] * 3
    seen(
        f"both counted; {(proxy.passed_up - before) / 1000:.0f} kB went up, rounds of "
        + ", ".join(f"{r['seconds']:.0f}" for r in records[:2])
        + " s"
    )


@pytest.mark.campaign
@pytest.mark.case(
    8, "every connection ends after 20 kB upwards, during a whole run of 40 kB updates"
)
def test_a_line_that_breaks_again_and_again_only_takes_longer(shared: World, seen: Seen) -> None:
    proxy = shared.sites[CUT].proxy
    before = proxy.connections
    proxy.truncate(20_000)
    try:
        run = shared.run(deadline=100)
        whole(shared, run)
    finally:
        proxy.mend()
    seen(f"{proxy.connections - before} connections, both in all rounds, same model")
