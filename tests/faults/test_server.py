"""Cases 1 to 5, 14, 49 and 50: a coordinator that dies, is stopped, or has no room left.

Two hospitals that stay up all the time; each case starts the server anew, broken as it needs.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.processes import children, marked, until
from harness.world import World, federation_of, same, seconds

NAMES = ("north", "south")
ROUNDS = 4
Seen = Callable[[str], None]
pytestmark = pytest.mark.timeout(800)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One run without any fault is done: its model is what the others must reach."""
    folder = tmp_path_factory.mktemp("server")
    study = {"rounds": ROUNDS, "min_sites": 2, "strategy": "fedavgm"}
    made = federation_of(folder / "world", NAMES, study)
    made.clean = made.run()  # type: ignore[attr-defined]
    made.ends(made.clean)  # type: ignore[attr-defined]
    yield made
    made.close()


def served(world: World, **spoils: Any) -> None:
    """The server runs with these spoils; the hospitals come back by themselves (min_sites is 2)."""
    if world.server is not None and world.server.popen.poll() is None:
        assert world.server.term(120) == 0
    world.serve(**spoils)


def whole(world: World, run: str) -> None:
    """Everybody was in every round once, and the model is that of the run without faults."""
    world.ends(run, 200)
    assert [r["round"] for r in world.rounds(run)] == list(range(1, ROUNDS + 2))
    assert world.left_out(run) == [{}] * (ROUNDS + 1)
    assert same(world.model(run), world.model(world.clean))  # type: ignore[attr-defined]


def trained(world: World, run: str) -> dict[str, list[int]]:
    """Rounds that each hospital answered, as often as it did."""
    return {
        s.name: [
            e["about"]["round"]
            for e in s.audit()
            if e["what"] == "answered" and (e["about"]["run"], e["about"]["kind"]) == (run, "round")
        ]
        for s in world.sites.values()
    }


DEATHS = [
    pytest.param("before round", 3, marks=pytest.mark.case(1, "SIGKILL before round 3 of 4")),
    pytest.param(
        "mid-round",
        2,
        marks=pytest.mark.case(2, "SIGKILL when one of two answers of round 2 is in"),
    ),
    pytest.param(
        "after aggregation",
        2,
        marks=[
            pytest.mark.campaign,
            pytest.mark.case(3, "SIGKILL between the new model of round 2 and its checkpoint"),
        ],
    ),
    pytest.param(
        "after checkpoint",
        2,
        marks=[
            pytest.mark.campaign,
            pytest.mark.case(3, "and between the checkpoint of round 2 and its announcement"),
        ],
    ),
    pytest.param(
        "in checkpoint",
        3,
        marks=[
            pytest.mark.campaign,
            pytest.mark.case(4, "SIGKILL with half of round 3's checkpoint written"),
        ],
    ),
]


@pytest.mark.parametrize(("at", "round_"), DEATHS)
def test_a_killed_server_goes_on_at_its_round(
    shared: World, seen: Seen, tmp_path: Path, at: str, round_: int
) -> None:
    served(shared, die={"at": at, "round": round_, "once": str(tmp_path / "dead")})
    assert shared.server is not None
    run = shared.run()
    shared.server.killed = True
    assert shared.server.ended(150) == -9
    stood = shared.state_of(run)
    assert stood.state == "running"
    since = time.monotonic()
    served(shared)
    whole(shared, run)
    over, answered = shared.state_of(run), trained(shared, run)
    assert over.attempt == 1
    repeated = {
        n: sorted({r for r in rounds if rounds.count(r) > 1}) for n, rounds in answered.items()
    }
    assert all(rounds in ([], [round_]) for rounds in repeated.values()), repeated
    twice = f"round {round_} again" if any(repeated.values()) else "no round twice"
    seen(
        f"stood at round {stood.round}; attempt {over.attempt} trained {twice}, done "
        f"{seconds(since)} after the start; same model bit by bit"
    )


@pytest.mark.case(5, "SIGTERM in the middle of a run")
def test_a_stopped_server_drains_and_the_run_goes_on_later(shared: World, seen: Seen) -> None:
    served(shared)
    assert shared.server is not None
    run = shared.run()
    shared.reached(run, 1)
    below = children(shared.server.pid)
    since = time.monotonic()
    assert shared.server.term(30) == 0
    took = seconds(since)
    assert not [pid for pid in below if pid in marked(shared.mark)]
    assert "Stopped; nothing is lost." in shared.server.said
    served(shared)
    whole(shared, run)
    seen(f"exit 0 after {took}, nothing of it left; the next start ended the run, same model")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
@pytest.mark.campaign
@pytest.mark.case(14, "the runs folder on a tmpfs of 1 MB, filled while round 2 is on")
def test_a_full_disk_pauses_the_run(shared: World, seen: Seen) -> None:
    served(shared)
    place = shared.fed / "runs"
    kept = shared.fed / "runs-before"
    place.rename(kept)
    place.mkdir(mode=0o700)
    mounted = ("mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(place))
    subprocess.run(mounted, check=True)
    try:
        run = shared.run()
        shared.reached(run, 1)
        fill = place / "fill"
        with fill.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        assert shared.server is not None
        shared.server.wait_for("could not be written", 120)
        time.sleep(2)
        stood = shared.state_of(run)
        assert stood.state in ("paused", "running"), stood
        assert [p for p in (place / run).rglob("*.part")] == []
        assert shared.server.popen.poll() is None
        fill.unlink()
        if stood.state == "paused":
            again = ("resume", run, "--detach", "--folder", str(shared.fed))
            assert shared.done("server", *again).returncode == 0
        shared.ends(run)
        model = shared.model(run)
    finally:
        subprocess.run(("umount", "-l", str(place)), check=True)
        place.rmdir()
        kept.rename(place)
    assert same(model, shared.model(shared.clean))  # type: ignore[attr-defined]
    seen(
        f"stood as {stood.state} at round {stood.round}, server up, no torn file; with room again "
        "the run ended with the same model"
    )


def paused_after(world: World, tmp_path: Path, round_: int) -> tuple[str, Path]:
    """A run whose server was killed after the checkpoint of a round; the newest checkpoint."""
    served(world, die={"at": "after checkpoint", "round": round_, "once": str(tmp_path / "dead")})
    assert world.server is not None
    run = world.run()
    world.server.killed = True
    assert world.server.ended(150) == -9
    return run, world.fed / "runs" / run / f"checkpoint-{round_:05d}.safetensors"


@pytest.mark.campaign
@pytest.mark.case(49, "server killed after round 3's checkpoint, one byte of it flipped")
def test_a_flipped_byte_falls_back_to_the_one_before(
    shared: World, seen: Seen, tmp_path: Path
) -> None:
    run, newest = paused_after(shared, tmp_path, 3)
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(bytes(content))
    served(shared)
    whole(shared, run)
    assert shared.server is not None
    assert "is not as this coordinator wrote it" in shared.server.said
    assert max(trained(shared, run)["north"].count(r) for r in (3,)) == 2
    seen("named aloud, round 3 trained again from round 2's checkpoint, same model")


@pytest.mark.campaign
@pytest.mark.case(50, "round 3's checkpoint replaced by a pickle that would make a file")
def test_a_pickled_checkpoint_is_refused(shared: World, seen: Seen, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    run, newest = paused_after(shared, tmp_path, 3)
    newest.write_bytes(pickle.dumps(_Opens(str(canary))))
    served(shared)
    whole(shared, run)
    assert not canary.exists()
    assert shared.server is not None
    assert "is not a whole safetensors file" in shared.server.said
    seen("refused aloud, nothing unpickled, round 3 trained again, same model")


class _Opens:
    """Unpickling it makes a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (self.file, "w"))


def test_the_hospitals_stayed_up_all_the_time(shared: World) -> None:
    served(shared)
    for site in shared.sites.values():
        assert site.process is not None
        assert site.process.popen.poll() is None
    until(lambda: len(marked(shared.mark)) > 4, 5)
