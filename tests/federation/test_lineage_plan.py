"""The coordinator can say which models a cohort is in, and what to train again without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medfl.common import config
from medfl.common.errors import ConfigError
from medfl.common.study import Study
from medfl.server import authority, lineage, studies
from medfl.server import cli as server_cli
from medfl.server.federation import Federation
from medfl.server.settings import ServerSettings, open_federation

C1, C2, C3 = "1" * 64, "2" * 64, "3" * 64
PLAIN = {
    "name": "lung",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a"}]},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": {"rounds": 3, "min_sites": 2},
}


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    settings = ServerSettings(name="T", listen="127.0.0.1:0", workers=1)
    authority.init(tmp_path / "fed", settings, 0.0)
    return open_federation(tmp_path / "fed")


def published(federation: Federation, **model: str) -> str:
    study = config.parse(PLAIN, Study, "test")
    if model:
        study = replace(study, name="fine", model=replace(study.model, **model))
    return studies.publish(federation, study).digest


def approve(federation: Federation, site: str, study: str, cohort: str) -> None:
    federation.record("approved", site=site, study=study, cohort=cohort, signature="")


def trained(federation: Federation, run: str, study: str, rounds: list[str]) -> None:
    """One run; a round is the sites in it ("ab"), or "" where it was void."""
    federation.record("run asked for", run=run, study=study, seed=1)
    federation.record("run started", run=run, study=study, sites=[])
    for number, sites in enumerate(rounds, 1):
        what = "round" if sites else "round void"
        model = f"{run}-{number}"
        federation.record(what, run=run, round=number, sites=list(sites), left_out=[], model=model)
    federation.record("model", run=run, sha256=f"{run}-file", round=len(rounds))


def test_a_site_is_in_every_model_from_its_first_round_on(federation: Federation) -> None:
    study = published(federation)
    approve(federation, "a", study, C1)
    approve(federation, "b", study, C2)
    trained(federation, "r1", study, ["a", "", "ab", "a"])
    trained(federation, "r2", study, ["a"])
    (found,) = lineage.affected_by(federation, "b")
    assert (found.run, found.rounds, found.sites) == ("r1", (3,), ("b",))
    assert found.models == {3: "r1-3", 4: "r1-4"}
    assert found.model == "r1-file"
    assert [f.run for f in lineage.affected_by(federation, "a")] == ["r1", "r2"]


def test_a_cohort_is_told_from_the_one_that_was_approved_after_it(federation: Federation) -> None:
    study = published(federation)
    approve(federation, "a", study, C1)
    trained(federation, "r1", study, ["a", "a"])
    approve(federation, "a", study, C3)
    trained(federation, "r2", study, ["a"])
    assert [f.run for f in lineage.affected_by(federation, C1[:8])] == ["r1"]
    assert [f.run for f in lineage.affected_by(federation, C3)] == ["r2"]


def test_an_approval_renewed_during_a_round_counts_both_cohorts(federation: Federation) -> None:
    study = published(federation)
    approve(federation, "a", study, C1)
    federation.record("run asked for", run="r", study=study, seed=1)
    federation.record("run started", run="r", study=study, sites=["a"])
    for number in (1, 2, 3):
        if number == 2:
            approve(federation, "a", study, C3)
        federation.record("round", run="r", round=number, sites=["a"], left_out=[], model="m")
    (old,), (new,) = (lineage.affected_by(federation, c) for c in (C1, C3))
    assert (old.rounds, new.rounds) == ((1, 2), (2, 3))


def test_a_model_that_starts_from_an_affected_one_is_affected(federation: Federation) -> None:
    study = published(federation)
    approve(federation, "b", study, C2)
    trained(federation, "r1", study, ["a", "b"])
    fine = published(federation, start_weights_sha256="r1-file")
    approve(federation, "a", fine, C1)
    trained(federation, "r2", fine, ["a"])
    direct, after = lineage.affected_by(federation, "b")
    assert (direct.run, direct.because) == ("r1", "")
    assert (after.run, after.because, after.rounds) == ("r2", "r1-file", ())
    assert after.models == {1: "r2-1"}
    # The model kept is from round 1, which b was not in.
    federation.record("model", run="r1", sha256="r1-file", round=1)
    (alone,) = lineage.affected_by(federation, "b")
    assert alone.model == ""


def test_who_is_not_known_is_an_error_and_not_an_all_clear(federation: Federation) -> None:
    study = published(federation)
    approve(federation, "a", study, "12" + "0" * 62)
    approve(federation, "a", study, "12" + "1" * 62)
    for unknown in ("nobody", "99999999", "12", "120"):
        with pytest.raises(ConfigError, match="is neither a site"):
            lineage.affected_by(federation, unknown)


def test_the_command_says_what_to_do_and_claims_no_unlearning(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = published(federation), ["--folder", str(federation.folder)]
    approve(federation, "b", study, C2)
    trained(federation, "r1", study, ["b"])
    assert server_cli.main(["plan-without", C2, *folder]) == 0
    out = capsys.readouterr().out
    assert "used in rounds 1 of b; every model from round 1 to 1 depends on it" in out
    assert "medfl-client exclude site.toml PATIENT; medfl-client approve lung" in out
    assert f"medfl-server run lung --folder {federation.folder}" in out
    assert server_cli.main(["plan-without", C2, *folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["affected"][0]["model"] == "r1-file"
    assert server_cli.main(["plan-without", "--help"]) == 0
    assert "takes nothing out of a model" in capsys.readouterr().out
