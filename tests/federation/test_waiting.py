"""A run waits for who has approved; a second study queues and says why."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from medfl.common import study_text
from medfl.common.approvals import Decision, signed
from medfl.common.kept import save_record
from medfl.common.signing import new_key, public_of
from medfl.common.study import load_study
from medfl.server import authority, cli, runs, studies, work
from medfl.server.engine import Engine
from medfl.server.federation import Federation, SiteRecord
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings, open_federation

STUDY = """
name = "NAME"
[task]
kind = "risk"
classes = ["no", "yes"]
[record]
features = [{ name = "a" }]
[model]
name = "logistic"
[training]
learning_rate = 0.1
batch_size = 8
local_steps = 4
[federation]
rounds = 2
min_sites = 1
"""


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Hospitals a and b have approved the study `one`; `two` is published."""
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    made = open_federation(tmp_path / "fed")
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text(STUDY.replace("NAME", name))
        studies.publish(made, load_study(tmp_path / f"{name}.toml"))
    digest, now = studies.find(made, "one").digest, int(time.time())
    for site in ("a", "b"):
        key = new_key(tmp_path / f"{site}.key")
        record = SiteRecord(site, "active", "0" * 64, now + 9e6, public_of(key), now)
        save_record(made.state / "sites" / f"{site}.json", record)
        yes = signed(key, Decision("approved", site, digest, "c" * 64, 10, now, now + 86400))
        save_record(made.state / "decisions" / digest / f"{site}.json", yes)
    return made


def asked(federation: Federation, name: str) -> Run:
    made = studies.find(federation, name)
    return runs.ask(federation, made, 2, seed=3, wait_s=60, deadline_s=60)


def test_a_run_waits_as_long_as_is_set_for_who_has_approved(
    federation: Federation, tmp_path: Path
) -> None:
    """As it was: 5 seconds, and who came later was left out of the whole run."""
    run = asked(federation, "one")
    study = study_text.from_text(studies.find(federation, "one").study)
    engine, looks = Engine(tmp_path / "engine"), []
    engine.roster.arrived("a", 1)

    def comes_at_the_third_look() -> None:
        looks.append(1)
        if len(looks) == 3:
            engine.roster.arrived("b", 2)

    assert work._quorum(federation, engine, run, study, lambda: None, 0.01) == ["a"]
    sites = work._quorum(federation, engine, run, study, comes_at_the_third_look, 30.0)
    assert sites == ["a", "b"]
    assert runs.load(federation, run.id).missing == ("b (not connected)",)


def test_a_second_study_says_what_it_waits_for(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = asked(federation, "one"), asked(federation, "two")
    runs.save(federation, replace(first, state="running", round=1))
    said = f"queued: one run at a time, and {first.id} is running, round 1 of 2"
    assert runs.queued_behind(federation, second) == said
    for command in ("runs", "status"):
        assert cli.main([command, "--folder", str(federation.folder)]) == 0
        assert said in capsys.readouterr().out
    runs.end(federation, first, "done", "", 0)
    assert runs.queued_behind(federation, second) == ""


def test_another_seed_beside_a_run_is_refused_and_not_ignored(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    run = asked(federation, "one")
    folder = ["--folder", str(federation.folder), "--detach"]
    assert cli.main(["run", "one", "--seed", "7", *folder]) != 0
    assert f"{run.id} is waiting with seed 3" in capsys.readouterr().err
    assert cli.main(["run", "one", "--seed", "3", *folder]) == 0
    assert cli.main(["run", "one", *folder]) == 0
    assert len(runs.everything(federation)) == 1
