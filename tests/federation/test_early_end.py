"""A run whose training a person ended early is done: tested, reported, and said to be shorter."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medfl.client.hospital import Hospital, answer
from medfl.common import study_text
from medfl.common.approvals import Decision, signed
from medfl.common.kept import save_record
from medfl.common.messages import Instruction, Reply
from medfl.common.signing import new_key, public_of
from medfl.common.study import Study
from medfl.server import authority, cli, runs, studies
from medfl.server.engine import Engine
from medfl.server.federation import Federation, SiteRecord
from medfl.server.rounds import Outcome, run_study
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings, open_federation
from medfl.server.work import work_off

ROUNDS = 20


class InThisProcess(Engine):
    """Hospitals a and b without a network; `between` is called after each round."""

    def __init__(self, folder: Path, hospitals: dict[str, Hospital]) -> None:
        super().__init__(folder)
        self._hospitals = hospitals
        self.between: Callable[[int], None] = lambda number: None
        for number, name in enumerate(hospitals):
            self.roster.arrived(name, number)

    def names(self) -> list[str]:
        return list(self._hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for name, asked in instructions:
            yield answer(self._hospitals[name], asked)

    def run(self, study: Study, **how: Any) -> Outcome:
        note = how["on_round"]

        def on_round(record: Any, weights: Any) -> None:
            note(record, weights)
            self.between(record.round)

        kept = {k: how[k] for k in ("seed", "run", "attempt", "earlier", "keep", "enough")}
        return run_study(study, self, on_round=on_round, **kept)


@pytest.fixture
def world(
    tmp_path: Path, risk_study: Callable[..., Study], risk_hospital: Callable[..., Hospital]
) -> tuple[Federation, InThisProcess, Run]:
    """Two hospitals that have approved a study of twenty rounds, and a run of it."""
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    study = risk_study(federation={"rounds": ROUNDS})
    made = studies.publish(federation, study)
    now = int(time.time())
    for site in ("a", "b"):
        key = new_key(tmp_path / f"{site}.key")
        record = SiteRecord(site, "active", "0" * 64, now + 9e6, public_of(key), now)
        save_record(federation.state / "sites" / f"{site}.json", record)
        yes = signed(key, Decision("approved", site, made.digest, "c" * 64, 10, now, now + 86400))
        save_record(federation.state / "decisions" / made.digest / f"{site}.json", yes)
    parts = ["train", "train", "test", "test"]
    agreed = study_text.from_text(made.study)
    hospitals = {
        name: risk_hospital(agreed, tmp_path, [-1, 1, -2, 2], [0, 1, 0, 1], parts, name=name)
        for name in ("a", "b")
    }
    run = runs.ask(federation, made, ROUNDS, seed=3, wait_s=5, deadline_s=60)
    return federation, InThisProcess(tmp_path / "engine", hospitals), run


def test_a_run_that_is_to_be_tested_now_is_done_with_its_test_metrics(
    world: tuple[Federation, InThisProcess, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was: a stopped run had no test metrics, and no other end was to be had."""
    federation, engine, run = world

    def asks(number: int) -> None:
        if number == 3:
            assert cli.main(["stop", run.id, "--test", "--folder", str(federation.folder)]) == 0

    engine.between = asks
    work_off(federation, engine, run, threading.Event(), 0.0)
    assert "measure its model on test cases, and it is done" in capsys.readouterr().out
    said = "training ended after round 3 of 20, because a person of the coordinator asked"
    done = runs.load(federation, run.id)
    assert (done.state, done.exit_code, done.round) == ("done", 0, 3)
    assert done.why.startswith(said)
    folder = runs.folder_of(federation, run.id)
    result = json.loads((folder / "result.json").read_text())
    assert (result["rounds"], result["ended_after"]) == (ROUNDS, 3)
    assert all(site["metrics"]["accuracy"] == 1.0 for site in result["sites"])
    card = (folder / "model_card.md").read_text()
    assert said in card
    assert "3 of 20" in card
    assert "nobody was asked for test cases" not in card
    cli.main(["runs", "--folder", str(federation.folder)])
    assert said in capsys.readouterr().out
    lines = [line["what"] for line in federation.audit.lines()]
    assert "run to be finished" in lines
    assert cli.main(["stop", run.id, "--test", "--folder", str(federation.folder)]) == 0
    assert "is over already" in capsys.readouterr().out


def test_a_stopped_run_tells_the_delta_of_a_hospital_with_privacy_of_its_own(
    world: tuple[Federation, InThisProcess, Run],
) -> None:
    """As it was: the study's delta, which a study without [privacy] does not have."""
    federation, engine, run = world
    asked = engine.ask

    def private(instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for reply in asked(instructions):
            own = reply.site == "b" and reply.delta
            yield replace(reply, epsilon=0.5, target_delta=1e-4) if own else reply

    engine.ask = private  # type: ignore[method-assign]
    engine.between = lambda number: number == 2 and runs.stop(federation, run.id)  # type: ignore[func-returns-value]
    work_off(federation, engine, run, threading.Event(), 0.0)
    assert runs.load(federation, run.id).state == "stopped"
    result = json.loads((runs.folder_of(federation, run.id) / "result.json").read_text())
    assert {s["name"]: s["delta"] for s in result["sites"]} == {"a": None, "b": 1e-4}


def test_the_end_of_a_run_needs_its_name(tmp_path: Path) -> None:
    assert cli.main(["stop", "--test", "--folder", str(tmp_path)]) == 2
