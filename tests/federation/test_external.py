"""A hospital with test cases alone: it trains nothing, is asked once, and stands in no mean."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medfl.client import foreseen
from medfl.client.data.check import check
from medfl.client.data.own import own_cohort
from medfl.client.hospital import Hospital, answer
from medfl.common import study_text
from medfl.common.approvals import Decision, signed
from medfl.common.errors import FederationError, MedflError, PolicyRefused
from medfl.common.kept import save_record
from medfl.common.messages import Instruction, Reply, refusal
from medfl.common.signing import new_key, public_of
from medfl.common.site import Policy, SitePrivacy, load_site
from medfl.common.study import Study
from medfl.common.tensors import digest
from medfl.server import authority, runs, studies
from medfl.server.checkpoint import Checkpoint
from medfl.server.engine import Engine
from medfl.server.federation import SiteRecord
from medfl.server.report.lines import result_lines
from medfl.server.report.run import read_run
from medfl.server.rounds import Earlier, Outcome, run_study
from medfl.server.settings import ServerSettings, open_federation
from medfl.server.work import work_off
from medfl.simulations.results import write_results
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals

MakeStudy = Callable[..., Study]
MakeHospital = Callable[..., Hospital]
PARTS = ["train", "train", "test", "test", "test", "test", "test"]
XS, YS = [-1, 1, -2, 2, -3, 3, 4], [0, 1, 0, 1, 0, 1, 1]


class Here(Engine):
    """Hospitals in this process, as an engine and as what it asks."""

    def __init__(self, hospitals: Iterable[Hospital], folder: Path = Path("unused")) -> None:
        super().__init__(folder)
        self._hospitals = {h.name: h for h in hospitals}
        self.asked: list[tuple[str, str]] = []
        for number, name in enumerate(self._hospitals):
            self.roster.arrived(name, number)

    def names(self) -> list[str]:
        return list(self._hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for name, asked in instructions:
            self.asked.append((name, asked.kind))
            try:
                yield answer(self._hospitals[name], asked)
            except MedflError as error:
                yield refusal(name, error, asked.round)

    def run(self, study: Study, **how: Any) -> Outcome:
        names = ("seed", "run", "attempt", "earlier", "keep", "enough", "on_round")
        return run_study(study, self, **{k: how[k] for k in names})


@pytest.fixture
def hospitals(risk_hospital: MakeHospital, tmp_path: Path) -> Callable[..., list[Hospital]]:
    """Two that train, and `out`, which only evaluates: four of its six cases are right."""

    def make(study: Study, where: str = "w", with_out: bool = True) -> list[Hospital]:
        made = [
            risk_hospital(study, tmp_path / where, XS, YS, PARTS, name=name) for name in ("a", "b")
        ]
        if with_out:
            xs, ys = [-1, 1, -2, 2, -3, 3], [0, 1, 0, 1, 1, 0]
            policy = Policy(evaluate_only=True)
            made.append(
                risk_hospital(
                    study, tmp_path / where, xs, ys, ["test"] * 6, name="out", policy=policy
                )
            )
        return made

    return make


def test_the_model_is_as_without_it_and_its_metrics_stand_apart(
    risk_study: MakeStudy, hospitals: Callable[..., list[Hospital]]
) -> None:
    study = risk_study(federation={"rounds": 3}, evaluation={"metrics": ["accuracy"]})
    here = Here(hospitals(study))
    outcome = run_study(study, here, seed=1)
    alone = run_study(study, Here(hospitals(study, "alone", with_out=False)), seed=1)
    assert digest(outcome.weights) == digest(alone.weights)
    assert [r.site for r in outcome.final] == ["a", "b"]
    (out,) = outcome.external
    assert (out.site, dict(out.counts)) == ("out", {"train": 0, "validation": 0, "test": 6})
    assert out.metrics["test"]["accuracy"] == pytest.approx(4 / 6, abs=1e-4)
    assert [kind for name, kind in here.asked if name == "out"] == ["prepare", "finish"]


def test_it_is_not_counted_among_the_hospitals_that_a_study_needs(
    risk_study: MakeStudy, hospitals: Callable[..., list[Hospital]]
) -> None:
    study = risk_study(federation={"rounds": 1, "min_sites": 3})
    with pytest.raises(FederationError, match="2 of 3 sites can take part; the study needs 3"):
        run_study(study, Here(hospitals(study)), seed=1)


def test_a_run_that_was_interrupted_still_asks_it(
    risk_study: MakeStudy, hospitals: Callable[..., list[Hospital]]
) -> None:
    study, kept = risk_study(federation={"rounds": 3}), list[Checkpoint]()
    run_study(study, Here(hospitals(study)), seed=1, keep=kept.append)
    earlier = Earlier(kept[0], [kept[0].record])
    again = run_study(study, Here(hospitals(study, "x")), seed=1, earlier=earlier, attempt=1)
    assert [r.site for r in again.external] == ["out"]


@pytest.mark.parametrize("kind", ["round", "keys", "shares", "unmask"])
def test_it_refuses_to_train_whatever_is_asked(
    risk_study: MakeStudy, hospitals: Callable[..., list[Hospital]], kind: Any
) -> None:
    study = risk_study()
    out = hospitals(study)[-1]
    asked = Instruction(kind=kind, study_digest=study.digest, run="r", round=1, seed=1)
    with pytest.raises(PolicyRefused, match=r"only evaluates .* asks it to train"):
        answer(out, asked)


@pytest.mark.parametrize(
    ("tables", "privacy", "words"),
    [
        ({"secure_aggregation": {}, "federation": {"rounds": 1, "min_sites": 2}}, None,
         "under .secure_aggregation. no hospital tells metrics"),
        ({}, SitePrivacy(epsilon=1.0, declared_patients=50), "states no price for metrics"),
    ],
)  # fmt: skip
def test_where_it_would_have_nothing_to_say_that_is_foreseen(
    risk_study: MakeStudy, tables: dict[str, Any], privacy: SitePrivacy | None, words: str
) -> None:
    found = foreseen.without_data(risk_study(**tables), Policy(evaluate_only=True), privacy)
    assert any(re.search(words, line) for line in found)
    assert not foreseen.without_data(risk_study(), Policy(evaluate_only=True), None)


def written(folder: Path, name: str, n: int, more: str = "") -> Path:
    place = folder / name
    place.mkdir(parents=True)
    lines = [f"p{i},{i % 7},{'yes' if i % 7 > 3 else 'no'}" for i in range(n)]
    (place / "cases.csv").write_text("\n".join(["patient,x,label", *lines]))
    (place / "site.toml").write_text(
        f'name = "{name}"\n[data]\nformat = "table"\npath = "cases.csv"\n{more}'
    )
    return place / "site.toml"


ONLY = "[policy]\nevaluate_only = true\n"


def test_all_its_cases_are_test_cases_and_the_check_says_so(
    risk_study: MakeStudy, tmp_path: Path
) -> None:
    site = load_site(written(tmp_path, "out", 20, ONLY))
    cohort = own_cohort(site, risk_study())
    assert {case.split for case in cohort.cases} == {"test"}
    found = check(site, risk_study())
    assert (found.cases["test"], found.exit_code) == (20, 0)
    assert found.notes[0].startswith("This hospital only evaluates (policy.evaluate_only)")


def test_too_few_test_cases_are_refused_as_such(risk_study: MakeStudy, tmp_path: Path) -> None:
    found = check(load_site(written(tmp_path, "out", 3, ONLY)), risk_study())
    assert "3 test patients, and this site's policy speaks of no fewer than 5" in found.faults[0]


def test_a_simulation_shows_it_in_a_section_of_its_own_and_compares_without_it(
    risk_study: MakeStudy, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        written(tmp_path / "sites", name, 60)
    written(tmp_path / "sites", "out", 30, ONLY)
    how = {"metrics": ["accuracy"], "bootstrap": 200}
    study = risk_study(federation={"rounds": 4}, evaluation=how)
    made = find_hospitals(study, tmp_path / "sites", tmp_path / "cache")
    planned = plan_runs(study, made, tmp_path / "out", ["local", "pooled"], "cpu")
    assert [[h.name for h in run.hospitals] for run in planned[1:]] == [["a", "b"]] * 2
    outcomes = run_all(planned, seed=1, machine=Machine(1))
    told = write_results(planned, outcomes, seed=1, seconds=1.0, environment={})
    assert [site["name"] for site in told["sites"]] == ["a", "b"]
    (out,) = told["external"]
    assert (out["name"], out["n_test"]) == ("out", 30)
    assert out["intervals"]["accuracy"] is not None
    (tmp_path / "out" / "study.json").write_text(study_text.to_text(study))
    run = read_run(tmp_path / "out")
    assert any(line.startswith("out (external)") for line in result_lines(run))
    from medfl.server.report.write import write_report

    write_report(tmp_path / "out")
    card = (tmp_path / "out" / "model_card.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "In external validation, at 1 hospital that took no part in training" in card
    assert "External validation" in page
    assert "out took no part in training: figures there say" in page


def test_between_hospitals_its_approval_says_so_and_the_report_lists_it(
    risk_study: MakeStudy, hospitals: Callable[..., list[Hospital]], tmp_path: Path
) -> None:
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    study = risk_study(federation={"rounds": 2, "min_sites": 2})
    made, now = studies.publish(federation, study), int(time.time())
    for site, cases in (("a", 2), ("b", 2), ("out", 0)):
        key = new_key(tmp_path / f"{site}.key")
        record = SiteRecord(site, "active", "0" * 64, now + 9e6, public_of(key), now)
        save_record(federation.state / "sites" / f"{site}.json", record)
        word = Decision("approved", site, made.digest, "c" * 64, cases, now, now + 86400)
        studies.decide(federation, record, signed(key, word))  # it was refused without a case
    run = runs.ask(federation, made, 2, seed=3, wait_s=5, deadline_s=60)
    work_off(federation, Here(hospitals(study)), run, threading.Event(), 0.0)
    done = runs.load(federation, run.id)
    assert (done.state, done.missing) == ("done", ())
    result = json.loads((runs.folder_of(federation, run.id) / "result.json").read_text())
    assert [site["name"] for site in result["sites"]] == ["a", "b"]
    assert [site["name"] for site in result["external"]] == ["out"]
    assert "out" not in result["refused"]


def test_hospitals_that_train_are_waited_for_not_only_any(
    risk_study: MakeStudy, hospitals: Callable[..., list[Hospital]], tmp_path: Path
) -> None:
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    study = risk_study(federation={"rounds": 2, "min_sites": 2})
    made, now = studies.publish(federation, study), int(time.time())
    for site, cases in (("a", 2), ("out", 0)):
        key = new_key(tmp_path / f"{site}.key")
        record = SiteRecord(site, "active", "0" * 64, now + 9e6, public_of(key), now)
        save_record(federation.state / "sites" / f"{site}.json", record)
        word = Decision("approved", site, made.digest, "c" * 64, cases, now, now + 86400)
        studies.decide(federation, record, signed(key, word))  # it was refused without a case
    run = runs.ask(federation, made, 2, seed=3, wait_s=0.1, deadline_s=60)
    engine = Here([h for h in hospitals(study) if h.name != "b"])
    work_off(federation, engine, run, threading.Event(), 0.0)
    failed = runs.load(federation, run.id)
    assert failed.state == "failed"
    assert "1 of the 2 sites that the study needs" in failed.why


def test_a_site_toml_without_the_key_keeps_its_word(tmp_path: Path) -> None:
    from medfl.client.reading import site_word

    site = load_site(written(tmp_path, "out", 5))
    key = new_key(tmp_path / "key")
    only = replace(site, policy=Policy(evaluate_only=True))
    assert site_word(key, site) != site_word(key, only)
