"""Secure sums between real processes: over the engine, and by the commands that people use."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medfl.common import tensors
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals

SECURE = "\n[secure_aggregation]\nthreshold = 0.5\nrange = 4.0\n"


def simulated(world: Any, seed: int = 7) -> Any:
    hospitals = find_hospitals(world.study, world.folder / "data", world.folder / "cache")
    runs = plan_runs(world.study, hospitals, world.folder / "simulated", [], "cpu")
    return run_all(runs, seed=seed, machine=Machine(workers=2))["main"]


@pytest.mark.slow
def test_a_secure_sum_over_the_engine_is_the_simulators_bit_for_bit(small: Any) -> None:
    """Then a trainer dies while its masked update is awaited: the others' sum goes on without it.

    The simulator spreads one site's steps over two workers, so what a site keeps is on its disk.
    """
    world = small(names=("east", "north", "south"), rounds=3, min_sites=2, more=SECURE)
    world.wait()
    south = world.sites["south"]

    def on_round(record: Any, weights: Any) -> None:
        if record.round == 1:
            kept.append(tensors.digest(weights))
            south.crash.touch()  # keys and shares came ahead: it dies in the round itself

    kept: list[str] = []
    outcome = world.engine.run(world.study, seed=7, deadline_s=120, on_round=on_round)
    left_out = {r.round: r.left_out for r in outcome.records}
    assert left_out[2] == {"south": "training process ended"}
    assert left_out[1] == left_out[3] == {}
    assert [r.void for r in outcome.records] == [False] * len(outcome.records)
    one_round = world.study_file.read_text().replace("rounds = 3", "rounds = 1")
    world.study_file.write_text(one_round)
    assert tensors.digest(simulated(world).last) == kept[0]


@pytest.mark.slow
def test_enrolled_hospitals_sum_under_keys_that_their_pinned_identities_signed(
    fed: Path, processes: Any, write_study: Callable[..., str]
) -> None:
    work = processes
    server = work.start("server", "start", until="listening on")
    study = Path(write_study(min_sites="min_sites = 3"))
    study.write_text(study.read_text() + "[secure_aggregation]\n")
    assert work.done("server", "study", "publish", "study.toml").returncode == 0
    options = {name: work.join(name) for name in ("east", "north", "south")}
    clients = []
    for own in options.values():
        site = Path(own[3])
        site.write_text(site.read_text() + "[policy]\nrequire_secure_aggregation = true\n")
        assert work.done("client", "studies", *own[:2]).returncode == 0
        shown = work.done("client", "show", "tiny", *own)
        assert "leaves under masks" in shown.stdout, shown.stderr
        signed = work.done("client", "approve", "tiny", "--yes", "--days", "30", *own)
        assert signed.returncode == 0, signed.stderr
        clients.append(work.start("client", "start", *own, until="Connected"))
    run = work.done("server", "run", "tiny", "--wait", "90", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)
    assert (result["state"], result["round"]) == ("done", 2)
    told = fed.rglob("progress.jsonl")
    lines = [json.loads(line) for file in told for line in file.read_text().splitlines()]
    assert [line["left_out"] for line in lines] == [{}] * len(lines)
    assert not any(line["void"] for line in lines)
    for process in (*clients, server):
        process.send_signal(signal.SIGTERM)
        assert work.ended(process) == 0
