"""The report of a run between hospitals: what they told and did not, and whose word it is."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.common import config, tensors
from medfl.common.errors import ConfigError, StorageError
from medfl.common.kept import save_record
from medfl.common.messages import Reply
from medfl.common.private_files import private_folder
from medfl.common.signing import public_of
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.server import authority, runs, studies
from medfl.server.cli import main
from medfl.server.federation import Federation, SiteRecord
from medfl.server.records import RoundRecord
from medfl.server.report import federated
from medfl.server.rounds import Outcome
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings, open_federation

STUDY = {
    "name": "falls",
    "title": "Falls in old age",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a"}]},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": {"rounds": 2},
}


def record(number: int, **more: Any) -> RoundRecord:
    sites = [
        {"name": n, "metrics": {"auroc": 0.6}, "loss": 0.5, "epsilon": None, "seconds": 1.0}
        for n in ("north", "south")
    ]
    sites.append({"name": "west", "metrics": {}, "loss": None, "epsilon": 1.5, "seconds": 1.0})
    plain: dict[str, Any] = {
        "run": "r",
        "round": number,
        "seconds": 2.0,
        "metrics": {"auroc": 0.6},
        "loss": 0.5,
        "sites": sites,
        "left_out": {},
        "void": False,
        "bytes_down": 3000,
        "bytes_up": 1200,
    }
    return RoundRecord(**{**plain, **more})


@pytest.fixture
def done(tmp_path: Path) -> tuple[Federation, Run]:
    """A run whose model is saved: two open hospitals, a private one, one refused, one absent."""
    settings = ServerSettings(name="Test", listen="127.0.0.1:0")
    authority.init(tmp_path / "fed", settings, time.time())
    federation = open_federation(tmp_path / "fed")
    for name in ("north", "south", "west", "east"):
        ends = time.time() + 1e6
        site = SiteRecord(name, "active", "c" * 64, ends, "k" * 64, enrolled=1)
        save_record(federation.state / "sites" / f"{name}.json", site)
    study = config.parse(STUDY, Study, "study")
    run = runs.ask(
        federation, studies.publish(federation, study), 2, seed=3, wait_s=1, deadline_s=1
    )
    private_folder(runs.folder_of(federation, run.id))
    run = replace(run, state="running", sites=("north", "south", "west"))
    rounds = [record(1), record(2, left_out={"east": "late"}), record(3, bytes_up=0)]
    for one in rounds:
        runs.add_round(federation, run.id, one)
    weights = {"w": np.ones(3, np.float32)}
    file = runs.folder_of(federation, run.id) / "model.safetensors"
    tensors.save(weights, file)
    run = replace(run, model=runs.sha256(file))
    runs.save(federation, run)
    outcome = Outcome(
        weights=weights,
        last=weights,
        selected_round=2,
        shared=Shared(),
        final=(
            Reply("north", metrics={"test": {"auroc": 0.8}}, counts={"train": 60, "test": 20}),
            Reply("south", metrics={"test": {"auroc": 0.6}}, counts={"train": 40, "test": 10}),
            Reply("west", epsilon=2.5, target_delta=1e-5),
        ),
        records=tuple(rounds),
        seconds=9.0,
        refused={"harbour": "privacy budget spent"},
    )
    federated.finish(federation, run, study, outcome)
    runs.end(federation, run, "done", "", 0)
    return federation, run


def test_the_report_says_what_hospitals_told_and_not_more(done: tuple[Federation, Run]) -> None:
    federation, run = done
    folder = runs.folder_of(federation, run.id)
    result = json.loads((folder / "result.json").read_text())
    assert result["mean"] == {"auroc": pytest.approx(0.7)}  # (0.8 + 0.6) / 2, without west
    assert result["bytes_per_round"] == 4200
    page = (folder / "report.html").read_text()
    for text in (
        "AUROC 0.700 on test cases, as the mean over 2 hospitals that told it, of 3 hospitals",
        "harbour took no part: privacy budget spent",
        "east took no part: the study is not approved here",
        "4.2 kB a round, all hospitals together: 3.0 kB to them, 1.2 kB from them",
        "Private hospitals told the coordinator no metric and no count of cases.",
    ):
        assert text in page, text
    assert "east was left out of 1 round: late" in page
    # Nothing claims intervals that there are not.
    assert "95 %" not in page
    assert "more than 0" not in page


def test_report_and_model_are_signed_together(
    done: tuple[Federation, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation, run = done
    signed = federated.opened(federation, run.id)
    assert signed.model == run.model
    assert signed.coordinator == public_of(federation.signing_key())
    lines = [line for line in federation.audit.lines() if line["what"] == "report"]
    assert [line["about"]["sha256"] for line in lines] == [signed.report]
    arguments = ["report", run.id, "--folder", str(federation.folder)]
    assert main(arguments) == 0
    # The mean of .8 and .6; the private hospital told nothing.
    assert capsys.readouterr().out.splitlines()[:5] == [
        "hospital          test cases  AUROC  ε",
        "north             20          0.800  none",
        "south             10          0.600  none",
        "west              –           –      2.50",
        "mean over 2 of 3              0.700",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == signed.signature
    assert runs.sha256(tmp_path / "out" / "report.html") == signed.report
    folder = runs.folder_of(federation, run.id)
    save_record(folder / "signed.json", replace(signed, run="another"))
    assert main(arguments) == 7
    assert "signed.json is not what the run wrote" in capsys.readouterr().err
    # Where it is missing, it is made again from the same files, to the same bytes.
    (folder / "signed.json").unlink()
    (folder / "report.html").unlink()
    assert federated.opened(federation, run.id) == signed


@pytest.mark.parametrize(
    "name", ["report.html", "model_card.md", "model.safetensors", "result.json"]
)
def test_a_changed_file_is_not_handed_out(done: tuple[Federation, Run], name: str) -> None:
    federation, run = done
    file = runs.folder_of(federation, run.id) / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(StorageError, match="is not what the run wrote"):
        federated.opened(federation, run.id)


def test_a_run_without_an_end_has_no_report(done: tuple[Federation, Run]) -> None:
    federation, run = done
    runs.save(federation, replace(run, state="stopped", model="", why="stopped by a person"))
    with pytest.raises(ConfigError, match="it is stopped"):
        federated.opened(federation, run.id)


def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    done: tuple[Federation, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, run = done
    outcome: Any = None

    def full(*_: object) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(federated, "_keep_facts", full)
    monkeypatch.setattr(federated, "facts", lambda *_: {})
    federated.finish(federation, run, config.parse(STUDY, Study, "study"), outcome)
    *_, last = federation.audit.lines()
    assert last["what"] == "report failed"
