"""A run that is stopped, or goes on, has the model of the rounds that it has done."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medfl.common import config, tensors
from medfl.common.errors import ConfigError
from medfl.common.private_files import private_folder
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.server import authority, runs, so_far, studies
from medfl.server.checkpoint import Checkpoint, Checkpoints, Model
from medfl.server.cli import main
from medfl.server.federation import Federation
from medfl.server.records import Best, RoundRecord
from medfl.server.report import federated
from medfl.server.roster import Prepared
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings, open_federation
from medfl.strategies.strategy import ServerState

STUDY = {
    "name": "falls",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a"}]},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": {"rounds": 12, "keep": "best", "best_metric": "auroc"},
}
PREPARED = Prepared({"a": "a", "b": "b"}, {"a": 3, "b": 2}, Shared(), {})


def weights(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


def record(number: int, epsilon: float) -> RoundRecord:
    sites = [
        {"name": "a", "metrics": {}, "loss": 0.5, "epsilon": None, "seconds": 1.0},
        {"name": "b", "metrics": {}, "loss": None, "epsilon": epsilon, "seconds": 1.0},
    ]
    return RoundRecord("main", number, 2.0, {"auroc": 0.7}, 0.5, sites, {}, False, 30, 12)


@pytest.fixture
def world(tmp_path: Path) -> tuple[Federation, Run]:
    """A run of 12 rounds after its sixth; the best was the model of round 4."""
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    made = studies.publish(federation, config.parse(STUDY, Study, "study"))
    run = runs.ask(federation, made, 12, seed=3, wait_s=1, deadline_s=1)
    folder = private_folder(runs.folder_of(federation, run.id))
    run = replace(run, state="running", round=6, sites=("a", "b"))
    runs.save(federation, run)
    for number in range(1, 7):
        runs.add_round(federation, run.id, record(number, 0.9 * number))
    model = Model(
        weights(6), tensors.digest(weights(6)), {}, ServerState(), Best("auroc", 4, 0.9, weights(4))
    )
    checkpoints = Checkpoints(folder, federation.signing_key(), run.digest, run.id)
    checkpoints.keep(Checkpoint(PREPARED, model, record(6, 5.4)))
    return federation, run


def test_a_stopped_run_has_its_best_model_and_a_report_with_what_was_spent(
    world: tuple[Federation, Run],
) -> None:
    """As it was: epsilon 5.4 spent, "has no model", "has no report"."""
    federation, run = world
    assert so_far.leave(federation, run)
    runs.end(federation, runs.load(federation, run.id), "stopped", "Stopped by a person.", 8)
    got = tensors.load(runs.model_of(federation, run.id))
    np.testing.assert_array_equal(got["w"], weights(4)["w"])
    assert federated.opened(federation, run.id).model == runs.load(federation, run.id).model
    folder = runs.folder_of(federation, run.id)
    result = json.loads((folder / "result.json").read_text())
    assert (result["stopped_after"], result["selected_round"]) == (6, 4)
    assert {s["name"]: s["epsilon"] for s in result["sites"]} == {"a": None, "b": 5.4}
    card = (folder / "model_card.md").read_text()
    assert "stopped after round 6 of 12" in card
    assert "5.4" in card
    assert list(folder.glob("checkpoint-*"))  # `resume` goes on from there
    assert runs.resume(federation, run.id).state == "waiting"


def test_the_best_model_so_far_is_written_on_request_while_the_run_goes_on(
    world: tuple[Federation, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation, run = world
    out = tmp_path / "so-far.safetensors"
    where = ["--out", str(out), "--folder", str(federation.folder)]
    assert main(["model", "so-far", run.id, *where]) == 0
    assert f"the model of round 4, SHA-256 {runs.sha256(out)}" in capsys.readouterr().out
    np.testing.assert_array_equal(tensors.load(out)["w"], weights(4)["w"])
    assert runs.load(federation, run.id) == run
    assert list(federation.audit.lines())[-1]["about"]["sha256"] == runs.sha256(out)


def test_a_run_without_a_round_has_nothing_so_far(
    world: tuple[Federation, Run], tmp_path: Path
) -> None:
    federation, run = world
    for file in runs.folder_of(federation, run.id).glob("checkpoint-*"):
        file.unlink()
    assert not so_far.leave(federation, run)
    with pytest.raises(ConfigError, match="no finished round yet"):
        so_far.copy(federation, run.id, tmp_path / "x.safetensors")


def test_a_checkpoint_under_another_rounds_name_is_set_aside(
    world: tuple[Federation, Run],
) -> None:
    federation, run = world
    folder = runs.folder_of(federation, run.id)
    checkpoints = Checkpoints(folder, federation.signing_key(), run.digest, run.id)
    (folder / "checkpoint-00006.safetensors").rename(folder / "checkpoint-00009.safetensors")
    assert checkpoints.last() is None
    assert (folder / "checkpoint-00009.damaged").exists()


def test_status_names_a_hospital_that_pulls_against_the_others_while_the_run_goes_on(
    world: tuple[Federation, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was: only the report said so, when all was over."""
    federation, run = world
    folder = ["--folder", str(federation.folder)]
    assert main(["status", *folder]) == 0
    assert "against the others" not in capsys.readouterr().out
    for number in range(7, 10):
        told = record(number, 0.1)
        sites = [
            {**told.sites[0], "name": name, "length": 1.0, "cosine": cosine}
            for name, cosine in (("a", 0.7), ("b", 0.8), ("c", -0.6))
        ]
        runs.add_round(federation, run.id, replace(told, sites=sites))
    assert main(["status", *folder]) == 0
    said = capsys.readouterr().out
    assert f"{run.id}: c pulls against the others: over 3 rounds" in said
    assert "a robust strategy" in said
