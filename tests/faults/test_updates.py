"""Cases 33, 34 and 37 to 48: a hospital with valid keys that sends what it should not.

Three hospitals in real processes and one run with a lie in each round (`harness/lies.py`); each
test looks at its own round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.processes import children, peak
from harness.world import World, federation_of, same

LIAR = "west"
NAMES = ("east", "mid", LIAR)
Seen = Callable[[str], None]

# how -> (case, what is said of it, what the coordinator says where)
LIES: dict[str, tuple[int, str, str]] = {
    # First: the message before it must be a sound one.
    "replay": (33, "round 2 answered with round 1's signed message", "names another asked"),
    "nan": (37, "one NaN", "value that is not finite"),
    "inf": (37, "one -Inf", "value that is not finite"),
    "shape": (38, "a transposed matrix", "parameter of another shape"),
    "broadcast": (38, "a matrix of shape (1,)", "parameter of another shape"),
    "missing": (39, "no bias", "missing parameter"),
    "extra": (39, "one parameter more", "unknown parameter"),
    "float64": (40, "float64", "parameter of another type"),
    "int": (40, "int32", "parameter of another type"),
    "1e15": (41, "1e15 cases", "claims more training cases"),
    "negative": (41, "-5 cases", "case count out of range"),
    "none": (41, "0 cases", "case count out of range"),
    "nan cases": (41, "NaN cases", "malformed answer"),
    "x1000": (42, "an update 1000 times as long", "update out of proportion"),
    "text": (48, "an unknown text field", "malformed answer"),
    "unsealed": (34, "no signature", "is not signed"),
    "other name": (34, "the reply in another's name", "answered in another name"),
    "other seal": (34, "a seal that names another, by the own key", "names another site"),
    "pickle": (44, "a pickle that would make a file", "malformed answer"),
    "object": (44, "an .npy of objects that would make a file", "malformed answer"),
    "bomb": (45, "1 GiB of zeros in 33 kB of zstandard", "cannot be unpacked"),
}
ROUND_OF = {how: number for number, how in enumerate(LIES, 2)}
ZERO, GOSSIP, VOID = len(LIES) + 2, len(LIES) + 3, len(LIES) + 4
ROUNDS = VOID + 1


@dataclass
class Lied:
    """The run with all the lies. grown: bytes by which the coordinator's peak grew meanwhile."""

    run: str
    rounds: dict[int, dict[str, Any]]
    logs: str
    canary: Path
    grown: int


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Three hospitals that tell the truth where no plan makes them lie."""
    folder = tmp_path_factory.mktemp("updates")
    spoils = {n: {"trainer": {"update": str(folder / f"{n}.json")}} for n in NAMES}
    study = {"rounds": ROUNDS, "min_sites": 2}
    made = federation_of(folder / "world", NAMES, study, spoils)
    yield made
    made.close()


@pytest.fixture(scope="module")
def lied(shared: World) -> Lied:
    """One run: a lie in each round, zeros, gossip, all three at once, and an honest last round."""
    folder = shared.folder.parent
    canary = folder / "canary"
    more = {"name": "east", "canary": str(canary)}
    plan = {str(number): {"how": how, **more} for how, number in ROUND_OF.items()}
    plan |= {str(ZERO): {"how": "zero"}, str(GOSSIP): {"how": "gossip"}}
    for name in NAMES:
        both = {**(plan if name == LIAR else {}), str(VOID): {"how": "nan"}}
        (folder / f"{name}.json").write_text(json.dumps(both))
    assert shared.server is not None
    pids = [shared.server.pid, *children(shared.server.pid)]
    run = shared.run()
    shared.reached(run, 1)  # by now the coordinator has imported what a run needs
    before = sum(peak(pid) for pid in pids)
    shared.ends(run, 270)
    grown = sum(peak(pid) for pid in pids) - before
    logs = shared.server.said + json.dumps(shared.audit())
    return Lied(run, {r["round"]: r for r in shared.rounds(run)}, logs, canary, grown)


@pytest.mark.parametrize(
    "how", [pytest.param(h, marks=pytest.mark.case(n, did)) for h, (n, did, _) in LIES.items()]
)
def test_a_lie_costs_its_hospital_that_round(lied: Lied, seen: Seen, how: str) -> None:
    record, why = lied.rounds[ROUND_OF[how]], LIES[how][2]
    assert list(record["left_out"]) == [LIAR]
    assert [s["name"] for s in record["sites"]] == ["east", "mid"]
    assert not record["void"]
    said = [record["left_out"][LIAR], *lied.logs.splitlines()]
    assert any(why in line for line in said), record["left_out"]
    seen(f"left out that round: {record['left_out'][LIAR]}")


def test_nothing_else_happened_to_the_run(shared: World, lied: Lied) -> None:
    assert [r for r in lied.rounds if lied.rounds[r]["void"]] == [VOID]
    assert lied.rounds[1]["left_out"] == lied.rounds[ROUNDS]["left_out"] == {}
    assert all(np.isfinite(a).all() for a in shared.model(lied.run).values())
    for site in shared.sites.values():
        assert site.process is not None
        assert site.process.popen.poll() is None
        assert "training process ended" not in site.process.said


@pytest.mark.case(44, "both payloads looked for afterwards")
def test_nothing_was_unpickled(lied: Lied, seen: Seen) -> None:
    assert not lied.canary.exists()
    seen("the canary file is absent")


@pytest.mark.case(
    45, "the coordinator's and its SuperLink's peak memory after round 1 and at the end"
)
def test_a_bomb_takes_no_memory(lied: Lied, seen: Seen) -> None:
    assert lied.grown < 2**26
    seen(f"grew {lied.grown / 2**20:.0f} MiB")


@pytest.mark.case(46, "an update of zeros")
def test_an_update_of_zeros_counts(lied: Lied, seen: Seen) -> None:
    record = lied.rounds[ZERO]
    assert record["left_out"] == {}
    assert LIAR in [s["name"] for s in record["sites"]]
    seen("counted")


@pytest.mark.case(48, "a metric that nobody asked for, and a text as a reason for left-out cases")
def test_gossip_is_dropped(shared: World, lied: Lied, seen: Seen) -> None:
    assert lied.rounds[GOSSIP]["left_out"] == {}
    assert "Canary" not in json.dumps(list(lied.rounds.values())) + lied.logs
    folder = shared.fed / "runs" / lied.run
    assert not [p for p in folder.rglob("*") if p.is_file() and b"Canary" in p.read_bytes()]
    seen("the update counted; the text is in no record, log or file of the run")


@pytest.mark.case(47, "NaN from all three hospitals in one round")
def test_a_round_of_lies_alone_changes_nothing(shared: World, lied: Lied, seen: Seen) -> None:
    models = {
        e["about"]["round"]: e["about"]["model"]
        for e in shared.audit()
        if e["what"] in ("round", "round void") and e["about"]["run"] == lied.run
    }
    assert models[VOID] == models[VOID - 1] != models[VOID + 1]
    assert set(lied.rounds[VOID]["left_out"]) == set(NAMES)
    seen("round void, all three named, the model's digest as before; the next round counted")


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.case(43, "five hospitals, one sends its update times -10 in 8 rounds; median")
def test_one_in_five_that_turns_its_updates_round_is_stood(
    federation: Callable[..., World], seen: Seen, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    world = federation(
        ("a", "b", "c", "d", LIAR),
        study={"rounds": 8, "strategy": "median", "min_sites": 5},
        spoils={LIAR: {"trainer": {"update": str(plan)}}},
    )
    clean = world.run(deadline=120)
    world.ends(clean, 300)
    plan.write_text(json.dumps({str(r): {"how": "flip"} for r in range(1, 9)}))
    flipped = world.run(deadline=120)
    world.ends(flipped, 300)
    scores = [world.rounds(r)[-1]["metrics"]["auroc"] for r in (clean, flipped)]
    assert world.left_out(flipped) == [{}] * 9
    assert not same(world.model(clean), world.model(flipped))
    assert scores[1] > scores[0] - 0.03
    seen(f"AUROC {scores[1]:.3f} against {scores[0]:.3f} without the flips")
