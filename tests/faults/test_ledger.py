"""Cases 20 to 22 and 52: the patients' privacy account when a hospital dies or is tampered with.

One open and one private hospital; the private one's trainer meets its fate.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness.world import PRIVATE, Site, World

from medfl.common.errors import PolicyRefused

Seen = Callable[[str], None]
pytestmark = pytest.mark.timeout(800)


@pytest.fixture
def private(
    federation: Callable[..., World], tmp_path: Path
) -> Callable[[], tuple[World, Site, Path]]:
    """A world, its private hospital, and the file with that one's fate."""

    def make() -> tuple[World, Site, Path]:
        fate = tmp_path / "fate.json"
        world = federation(
            study={"rounds": 3},
            spoils={"south": {"trainer": {"fate": str(fate)}}},
            south=PRIVATE,
        )
        return world, world.sites["south"], fate

    return make


def uses(site: Site) -> list[int]:
    """Rounds of training in the ledger."""
    return [e.charge.round for e in site.ledger.entries() if e.charge.purpose == "training"]


def killed(world: World, site: Site, fate: Path, at: str) -> str:
    """A run in which the whole private hospital is killed at that moment of its second round."""
    run = world.run(deadline=60)
    world.reached(run, 1)
    fate.write_text(json.dumps({"at": at, "do": "kill all"}))
    assert site.process is not None
    site.process.killed = True
    assert site.process.ended(90) == -9
    return run


def answers(site: Site, run: str) -> list[int]:
    """Rounds that the hospital's log says it answered."""
    return [
        e["about"]["round"]
        for e in site.audit()
        if e["what"] == "answered" and (e["about"]["run"], e["about"]["kind"]) == (run, "round")
    ]


@pytest.mark.case(20, "SIGKILL of client and trainer when a round's use is in the ledger")
def test_what_was_reserved_stays_spent(private: Any, seen: Seen) -> None:
    world, site, fate = private()
    run = killed(world, site, fate, "after ledger")
    before, told = uses(site), answers(site, run)
    assert before[-1] not in told
    site.start(**{"trainer": {"fate": str(fate)}})
    world.ends(run, 150)
    after = uses(site)
    assert after[: len(before)] == before
    seen(
        f"the ledger had rounds {before} and the log answers of {told}; at the end {after}: a "
        "round asked again is charged again"
    )


@pytest.mark.campaign
@pytest.mark.case(21, "SIGKILL of client and trainer just before the ledger's line")
def test_without_a_line_in_the_ledger_nothing_is_sent(private: Any, seen: Seen) -> None:
    world, site, fate = private()
    run = killed(world, site, fate, "before ledger")
    charged, told = uses(site), answers(site, run)
    assert set(told) <= set(charged)
    counted = {r["round"] for r in world.rounds(run) if "south" in [s["name"] for s in r["sites"]]}
    assert counted <= set(charged)
    world.over(run, 150)
    seen(f"ledger {charged}, answered {told}, counted by the coordinator {sorted(counted)}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
@pytest.mark.campaign
@pytest.mark.case(22, "the hospital's state folder on a tmpfs of 4 MB, filled before the run")
def test_nothing_is_trained_on_a_full_disk(world: World, seen: Seen) -> None:
    world.init()
    world.serve()
    world.publish(rounds=2)
    small = world.folder / "small"
    small.mkdir()
    subprocess.run(
        ("mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(small)), check=True
    )
    try:
        site = world.join("south", "")
        shutil.move(site.state, small / "state")
        site.state.symlink_to(small / "state")
        site.approve("tiny")
        site.start()
        world.connected("south")
        fill(small / "fill")
        run = world.run()
        over = world.over(run, 150)
        assert over.state == "failed"
        assert answers(site, run) == []
        assert site.process is not None
        (small / "fill").unlink()
        # It ends when it next writes, and goes on where that was after the room was made.
        with suppress(AssertionError):
            site.process.ended(15)
        code = site.process.popen.poll()
        assert code in (None, 7), site.process.said
        if code is not None:
            assert world.server is not None
            since = len(world.server.lines)
            site.start()
            world.connected("south", since=since)
        again = world.over(world.run(seed=9), 90)
        assert again.state == "done", (again, code, site.process.said)
        assert str(world.folder) not in json.dumps(world.audit()) + over.why
        seen(
            f"{over.why[:120]}...; client {'ended with exit 7' if code else 'went on'}; no path "
            "left the hospital; with room again the next run is done"
        )
        site.process.term()
    finally:
        world.spoilt.add("south")
        world.check()
        for one in world.sites.values():
            if one.process is not None and one.process.popen.poll() is None:
                one.process.term()
        subprocess.run(("umount", "-l", str(small)), check=True)


def fill(file: Path) -> None:
    """Until the disk takes no more."""
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.campaign
@pytest.mark.case(52, "the ledger put back to an earlier copy, then its whole folder deleted")
def test_a_ledger_that_shrank_stops_the_hospital(private: Any, seen: Seen) -> None:
    world, site, _ = private()
    folder = site.ledger.folder
    run = world.run()
    world.reached(run, 1)
    early = {p.name: p.read_bytes() for p in folder.iterdir()}
    world.ends(run)
    late = {p.name: p.read_bytes() for p in folder.iterdir()}
    world.publish("more", rounds=1)
    for one in world.sites.values():
        one.approve("more")

    def put_back(content: Mapping[str, bytes]) -> None:
        for path in list(folder.iterdir()):
            path.unlink()
        for name, raw in content.items():
            (folder / name).write_bytes(raw)

    def sites_of(run: str) -> set[str]:
        return {s["name"] for r in world.rounds(run) for s in r["sites"]}

    assert world.server is not None
    for content in (early, {}):
        put_back(content)
        again = world.run("more", seed=len(content))
        world.ends(again)
        assert sites_of(again) == {"north"}
        assert site.process is not None
        assert site.process.ended(60) == PolicyRefused.exit_code
        assert "Restore its latest copy" in site.process.said
        put_back(late)
        since = len(world.server.lines)
        site.start()
        world.connected("south", since=since)
    assert [e["what"] for e in site.audit()].count("privacy ledger was rolled back") >= 2
    whole = world.run("more", seed=5)
    world.ends(whole)
    assert sites_of(whole) == {"north", "south"}
    seen(
        "took no part both times, noted in its log, and ended with exit 5 and what to restore; the "
        "coordinator holds a countersigned word of the ledger; with the latest copy back it takes "
        "part again"
    )
