"""A coordinator that died goes on: same model, no update twice, no damaged file believed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medfl.client.hospital import Hospital, answer
from medfl.common import tensors
from medfl.common.messages import Instruction, Reply
from medfl.common.signing import SigningKey, new_key
from medfl.common.study import Study
from medfl.common.tensors import Tensors, digest
from medfl.server.checkpoint import Checkpoint, Checkpoints
from medfl.server.records import RoundRecord
from medfl.server.rounds import Earlier, Outcome, run_study

MakeStudy = Callable[..., Study]
MakeHospital = Callable[..., Hospital]
ROUNDS = 4
CASES = {"a": ((-1.0, 1.0, 2.0, 0.5), (0, 1, 1, 0)), "b": ((-3.0, 0.5, 1.0, 1.0), (1, 0, 1, 0))}
PARTS = ("train", "train", "train", "validation")


class Died(Exception):
    """The coordinator is gone."""


class Sites:
    """Both hospitals; the coordinator dies when the last answer of round `dies_at` is there."""

    def __init__(self, hospitals: Iterable[Hospital], dies_at: int = 0) -> None:
        self._hospitals = {h.name: h for h in hospitals}
        self._dies_at = dies_at
        self.asked: list[Instruction] = []

    def names(self) -> list[str]:
        return list(self._hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        everything = list(instructions)
        for number, (name, asked) in enumerate(everything, start=1):
            self.asked.append(asked)
            reply = answer(self._hospitals[name], asked)
            if (asked.kind, asked.round, number) == ("round", self._dies_at, len(everything)):
                raise Died
            yield reply


@dataclass
class World:
    """Where a run's hospitals and checkpoints lie; each method is a process of its own."""

    folder: Path
    make: MakeHospital
    key: SigningKey
    study: Study

    def sites(self, dies_at: int = 0) -> Sites:
        made = [self.make(self.study, self.folder, *CASES[n], PARTS, name=n) for n in CASES]
        return Sites(made, dies_at)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder, self.key, self.study.digest, "r")

    def run(self, sites: Sites, **more: Any) -> Outcome:
        return run_study(self.study, sites, seed=5, run="r", keep=self.checkpoints().keep, **more)

    def go_on(self, records: list[RoundRecord]) -> tuple[Outcome, Sites]:
        sites, kept = self.sites(), self.checkpoints().last()
        earlier = None if kept is None else Earlier(kept, records)
        return self.run(sites, attempt=1, earlier=earlier), sites


@pytest.fixture
def world(
    tmp_path: Path, risk_study: MakeStudy, risk_hospital: MakeHospital
) -> Callable[..., World]:
    torch.set_num_threads(1)

    def make(name: str = "world", **federation: Any) -> World:
        study = risk_study(federation={"rounds": ROUNDS, **federation})
        folder = tmp_path / name
        folder.mkdir()
        return World(folder, risk_hospital, new_key(folder / "key"), study)

    return make


KINDS = {
    "fedavg": {},
    "fedavgm": {"strategy": "fedavgm"},
    "fedadam": {"strategy": "fedadam"},
    "scaffold": {"strategy": "scaffold", "weighting": "equal"},
    "local": {"strategy": "local"},
    "int8": {"updates": "int8"},
    "drawn": {"sites_per_round": 1},
    "best": {"keep": "best", "best_metric": "accuracy"},
    "average": {"keep": "average", "strategy": "fedadam"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dies_at", [2, ROUNDS])
def test_a_run_that_died_among_the_answers_ends_as_if_it_had_not(
    world: Callable[..., World], kind: str, dies_at: int
) -> None:
    whole = world("whole", **KINDS[kind])
    expected = whole.run(whole.sites())
    broken, records = world("broken", **KINDS[kind]), []
    with pytest.raises(Died):
        broken.run(broken.sites(dies_at), on_round=lambda r, weights: records.append(r))
    outcome, again = broken.go_on(records)
    assert digest(outcome.weights) == digest(expected.weights)
    assert outcome.selected_round == expected.selected_round
    timeless = [[replace(r, seconds=0, sites=[]) for r in o.records] for o in (outcome, expected)]
    assert timeless[0] == timeless[1]
    rounds = sorted({a.round for a in again.asked if a.kind == "round"})
    assert rounds == list(range(dies_at, ROUNDS + 1))
    assert all(a.attempt == 1 for a in again.asked)


def test_a_round_that_was_kept_is_not_trained_again(world: Callable[..., World]) -> None:
    """The coordinator dies between writing the checkpoint and telling of the round."""
    whole = world("whole")
    expected = whole.run(whole.sites())
    broken, records = world("broken"), []

    def on_round(record: RoundRecord, weights: Tensors) -> None:
        if record.round == 2:
            raise Died
        records.append(record)

    with pytest.raises(Died):
        broken.run(broken.sites(), on_round=on_round)
    kept = broken.checkpoints().last()
    assert kept is not None
    outcome, again = broken.go_on([*records, kept.record])
    assert [a.round for a in again.asked if a.kind == "round"] == [3, 3, 4, 4]
    assert digest(outcome.weights) == digest(expected.weights)


# --- the files ---------------------------------------------------------------------------------


def same(left: Checkpoint, right: Checkpoint) -> bool:
    ours, theirs = left.model, right.model
    return (
        (left.prepared, left.record, ours.digest, ours.state.round)
        == (right.prepared, right.record, theirs.digest, theirs.state.round)
        and digest(ours.weights) == digest(theirs.weights)
        and digest(ours.control) == digest(theirs.control)
        and {s: digest(a) for s, a in ours.state.slots.items()}
        == {s: digest(a) for s, a in theirs.state.slots.items()}
        and (ours.best.metric, ours.best.round, ours.best.value, digest(ours.best.weights))
        == (theirs.best.metric, theirs.best.round, theirs.best.value, digest(theirs.best.weights))
    )


def kept_of(world: World) -> list[Checkpoint]:
    """Runs, and returns what was kept of each round."""
    kept: list[Checkpoint] = []

    def keep(checkpoint: Checkpoint) -> None:
        world.checkpoints().keep(checkpoint)
        kept.append(checkpoint)

    run_study(world.study, world.sites(), seed=5, run="r", keep=keep)
    return kept


def files(world: World) -> list[Path]:
    return sorted(world.folder.glob("checkpoint-*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_comes_back_as_it_was(world: Callable[..., World], kind: str) -> None:
    here = world(**KINDS[kind])
    kept = kept_of(here)
    found = here.checkpoints().last()
    assert found is not None
    assert same(found, kept[-1])
    assert not same(found, kept[-2])


def test_the_last_two_are_kept_and_only_their_owner_reads_them(
    world: Callable[..., World],
) -> None:
    here = world()
    kept_of(here)
    assert [f.name[11:16] for f in files(here)] == ["00003", "00004"]
    assert all(f.stat().st_mode & 0o077 == 0 for f in files(here))
    here.checkpoints().drop()
    assert files(here) == []


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


def edit_words(file: Path) -> None:
    raw = file.read_bytes()
    assert raw.count(b'\\"round\\":4') == 1
    file.write_bytes(raw.replace(b'\\"round\\":4', b'\\"round\\":3'))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def put_a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"weights": [1.0]}))


def put_unsigned(file: Path) -> None:
    tensors.save({"weights/w": np.ones(1, np.float32)}, file)


@pytest.mark.parametrize("damage", [flip, edit_words, cut, put_a_pickle, put_unsigned])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    world: Callable[..., World],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = world()
    kept = kept_of(here)
    damage(files(here)[-1])
    found = here.checkpoints().last()
    assert found is not None
    assert same(found, kept[-2])
    assert "checkpoint-00004.safetensors" in caplog.text
    flip(files(here)[-1])
    assert here.checkpoints().last() is None
    assert [f.suffix for f in sorted(here.folder.glob("checkpoint-*"))] == [".damaged"] * 2


def test_another_runs_or_another_coordinators_checkpoint_does_not_count(
    world: Callable[..., World], tmp_path: Path
) -> None:
    here = world()
    kept_of(here)
    mine = here.checkpoints()
    for other in (
        replace(mine, key=new_key(tmp_path / "other")),
        replace(mine, run="s"),
        replace(mine, study="0" * 64),
    ):
        assert other.last() is None
        for file in here.folder.glob("*.damaged"):
            file.rename(file.with_suffix(".safetensors"))
    assert mine.last() is not None
