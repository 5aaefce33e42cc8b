"""The real federation: an engine, tunnels and sites, as processes on this machine."""

from __future__ import annotations

import pytest

from medfl.common import tensors
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals


def simulated(world, seed: int = 7):
    hospitals = find_hospitals(world.study, world.folder / "data", world.folder / "cache")
    runs = plan_runs(world.study, hospitals, world.folder / "simulated", [], "cpu")
    return run_all(runs, seed=seed, machine=Machine(workers=1))["main"]


@pytest.mark.slow
def test_the_federation_ends_with_the_simulators_model_bit_for_bit(small) -> None:
    world = small()
    world.wait()
    outcome = world.engine.run(world.study, seed=7, deadline_s=60)
    for record in outcome.records:
        print(record.round, round(record.seconds, 3), [s["seconds"] for s in record.sites])
    assert tensors.digest(outcome.weights) == tensors.digest(simulated(world).weights)
