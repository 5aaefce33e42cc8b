"""A run outlives the server that works on it; real processes, and the simulator's model."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medfl.common import tensors
from medfl.common.study import load_study
from medfl.server import runs
from medfl.server.runs import Run
from medfl.server.settings import open_federation
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals

ROUNDS = 12


@dataclass
class World:
    """Two hospitals at work on a study of twelve rounds, with momentum on the server."""

    work: Any
    fed: Path
    server: Any = None
    options: dict[str, list[str]] = field(default_factory=dict)

    def start_server(self) -> None:
        self.server = self.work.start("server", "start", until="listening on")

    def ask(self) -> str:
        asked = self.work.done("server", "run", "tiny", "--wait", "60", "--detach", "--json")
        return str(json.loads(asked.stdout)["run"])

    def state(self, run_id: str) -> Run:
        return runs.load(open_federation(self.fed), run_id)

    def until(self, run_id: str, condition: Callable[[Run], bool], within_s: float = 120) -> Run:
        end = time.monotonic() + within_s
        while not condition(now := self.state(run_id)):
            assert time.monotonic() < end, now
            time.sleep(0.05)
        return now

    def model(self, run_id: str) -> str:
        return tensors.digest(tensors.load(self.fed / "runs" / run_id / "model.safetensors"))

    def simulated(self) -> str:
        study = load_study(self.work.folder / "study.toml")
        sites = find_hospitals(study, self.work.folder / "sites", self.work.folder / "cache")
        planned = plan_runs(study, sites, self.work.folder / "simulated", [], "cpu")
        outcome = run_all(planned, seed=42, machine=Machine(workers=1))["main"]
        return tensors.digest(outcome.weights)


@pytest.fixture
def world(fed: Path, processes: Any, write_study: Callable[..., str]) -> World:
    made = World(processes, fed)
    write_study(rounds=f'rounds = {ROUNDS}\nstrategy = "fedavgm"')
    made.start_server()
    assert processes.done("server", "study", "publish", "study.toml").returncode == 0
    for name in ("north", "south"):
        made.options[name] = options = processes.join(name, "sites")
        processes.done("client", "studies", *options[:2])
        signed = processes.done("client", "approve", "tiny", "--yes", *options)
        assert signed.returncode == 0, signed.stderr
        processes.start("client", "start", *options, until="Connected")
    return made


def verified(world: World) -> None:
    assert world.work.done("server", "log", "--verify").returncode == 0
    for options in world.options.values():
        assert world.work.done("client", "audit", "verify", *options[:2]).returncode == 0


@pytest.mark.slow
def test_a_killed_server_goes_on_where_it_was_and_ends_with_the_same_model(world: World) -> None:
    run_id = world.ask()
    world.until(run_id, lambda run: run.round >= 3)
    world.server.send_signal(signal.SIGKILL)
    world.work.ended(world.server)
    stood = world.state(run_id)
    assert stood.state == "running"
    world.start_server()
    done = world.until(run_id, lambda run: run.state in runs.OVER)
    assert (done.state, done.attempt, done.round) == ("done", 1, ROUNDS)
    told = [r.round for r in runs.progress(open_federation(world.fed), run_id)]
    assert told == list(range(1, ROUNDS + 2))
    assert world.model(run_id) == world.simulated()
    assert not list((world.fed / "runs" / run_id).glob("checkpoint-*"))
    verified(world)


@pytest.mark.slow
def test_a_run_goes_on_after_a_person_stopped_it_or_the_server(world: World) -> None:
    run_id = world.ask()
    world.until(run_id, lambda run: run.round >= 2)
    assert world.work.done("server", "stop", run_id).returncode == 0
    stopped = world.until(run_id, lambda run: run.state in runs.OVER)
    assert (stopped.state, stopped.exit_code) == ("stopped", 8)
    assert f"medfl-server resume {run_id}" in stopped.why
    assert world.work.done("server", "report", run_id).returncode == 0
    assert world.work.done("server", "resume", run_id, "--detach").returncode == 0
    world.until(run_id, lambda run: run.round > stopped.round)
    started = time.monotonic()
    world.server.send_signal(signal.SIGTERM)
    assert world.work.ended(world.server) == 0
    assert time.monotonic() - started < 30
    assert world.state(run_id).state == "running"
    world.start_server()
    done = world.until(run_id, lambda run: run.state in runs.OVER)
    assert (done.state, done.attempt) == ("done", 2)
    assert world.model(run_id) == world.simulated()
    assert world.work.done("server", "resume", run_id).returncode == 2
    verified(world)
