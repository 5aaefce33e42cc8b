"""Studies whose updates travel in fewer bytes: as good a model, the same bits, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.common.metrics.scores import load
from medfl.common.packing import KINDS
from medfl.common.study import Study
from medfl.common.tensors import digest
from medfl.server.rounds import Outcome
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals

MLP = {"name": "mlp", "options": {"hidden": [64, 64]}}
MakeStudy = Callable[..., Study]
Federate = Callable[..., Outcome]


def metric(outcome: Outcome, name: str) -> float:
    return float(np.mean([r.metrics["test"][name] or 0.0 for r in outcome.final]))


def bytes_up(outcome: Outcome) -> list[int]:
    return [r.bytes_up for r in outcome.records]


@pytest.mark.slow
def test_fewer_bytes_give_as_good_a_model(table_study: MakeStudy, federate: Federate) -> None:
    found = {kind: federate(table_study(model=MLP, updates=kind)) for kind in KINDS}
    plain = 5 * 4 * sum(a.size for a in found["float32"].weights.values())
    share = {kind: np.mean(bytes_up(outcome)) / plain for kind, outcome in found.items()}
    assert share["float32"] < 0.95
    assert share["float16"] < 0.5
    assert share["int8"] < 0.28  # 5,000 numbers; the head is 2 % of it
    assert share["int4"] < 0.15
    # About 130 test patients: the standard error of an AUROC of 0.95 is 0.02 (Hanley & McNeil).
    for kind in KINDS:
        assert metric(found[kind], "auroc") == pytest.approx(
            metric(found["float32"], "auroc"), abs=0.02
        )
        assert metric(found[kind], "brier") == pytest.approx(
            metric(found["float32"], "brier"), abs=0.01
        )
    assert all(r.bytes_down == plain for r in found["int8"].records)


def test_packing_float32_changes_no_bit(
    table_study: MakeStudy, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = table_study(model=MLP, rounds=3)
    packed = federate(study)
    monkeypatch.setattr("medfl.client.outgoing.pack_exactly", lambda delta: delta)
    plain = federate(study)
    assert bytes_up(packed)[0] < bytes_up(plain)[0]
    assert digest(packed.weights) == digest(plain.weights)


@pytest.mark.parametrize("updates", ["int8", "int4", "float16"])
def test_any_number_of_workers_gives_the_same_bits(
    table_study: MakeStudy, tables: Path, tmp_path: Path, updates: str
) -> None:
    study = table_study(model=MLP, rounds=3, updates=updates)
    found = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        out.mkdir()
        hospitals = find_hospitals(study, tables, tmp_path / "cache")
        runs: Any = plan_runs(study, hospitals, out, [], "cpu")
        outcome = run_all(runs, seed=3, machine=Machine(workers, "cpu"))["main"]
        scores = load(out / "sites" / "h0" / "scores.npz")
        found.append((digest(outcome.weights), bytes_up(outcome), len(scores)))
    assert found[0] == found[1]
