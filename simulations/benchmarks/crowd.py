"""A run of a real coordinator with many light hospitals (`light`), all in one process."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from medfl.client import enrolment
from medfl.client.premises import Home
from medfl.common.tensors import Array, Tensors
from medfl.server import authority
from medfl.server.settings import open_federation
from medfl.simulations.benchmarks.deployed import Deployed
from medfl.simulations.benchmarks.light import update
from medfl.simulations.benchmarks.plain import same, table
from medfl.simulations.benchmarks.work import Work, first_weights, write_hospital


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run. seconds: of each round but the first. peaks: bytes, of coordinator and engine.

    bytes_: of the disk before and after, of the model, and of a round's wire up and down.
    """

    seconds: list[float]
    peaks: dict[str, int]
    bytes_: dict[str, int]
    agree: bool


def measured(count: int, megabytes: float, rounds: int) -> Cost:
    """One run with so many hospitals."""
    names = tuple(f"site-{i:03}" for i in range(count))
    work = Work(megabytes, rounds, names)
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as folder:
        federation = Deployed(Path(folder) / "medfl")
        try:
            federation.start()
            federation.publish(work)
            first = first_weights(work.write_study(Path(folder) / "study.toml"))
            shapes = {name: a.shape for name, a in first.items()}
            _join(federation, names, shapes)
            before = _disk(federation.folder / "fed")
            ended = federation.run()
            after = _disk(federation.folder / "fed")
            whole = all(not r["void"] and not r["left_out"] for r in ended.rounds)
            bytes_ = {
                "disk_before": before,
                "disk_after": after,
                "up": int(median(r["bytes_up"] for r in ended.rounds)),
                "down": int(median(r["bytes_down"] for r in ended.rounds)),
                "model": sum(a.nbytes for a in first.values()),
            }
            agree = whole and same(expected(first, names, rounds), ended.weights)
            seconds = [r["seconds"] for r in ended.rounds[1:]]
            return Cost(seconds, federation.peaks(), bytes_, agree)
        finally:
            federation.end()


def expected(first: Tensors, names: tuple[str, ...], rounds: int) -> dict[str, Array]:
    """The model after all rounds, summed here in one pass."""
    weights = {name: a.astype(np.float64) for name, a in first.items()}
    shapes = {name: a.shape for name, a in first.items()}
    cases = [len(table(site)[1]) for site in range(len(names))]
    for round_ in range(1, rounds + 1):
        for name, n in zip(names, cases, strict=True):
            for key, delta in update(name, round_, shapes).items():
                weights[key] += n / sum(cases) * delta
    return {name: a.astype(np.float32) for name, a in weights.items()}


def _join(federation: Deployed, names: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """Enrol all and wait until they are connected; what commands would do is done here."""
    fed = open_federation(federation.folder / "fed")
    hospitals = []
    for site, name in enumerate(names):
        file = write_hospital(federation.folder / name, name, site)
        state = federation.folder / name / "state"
        enrolment.enrol(Home(state), federation.address, authority.invite(fed, name, 1.0))
        hospitals.append({"state": str(state), "site": str(file)})
    told = federation.folder / "light.json"
    told.write_text(json.dumps({"shapes": shapes, "hospitals": hospitals}), encoding="utf-8")
    federation.processes.start(
        "light", sys.executable, "-m", "medfl.simulations.benchmarks.light", str(told)
    )
    federation.processes.until("light", "all connected")


def _disk(folder: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())
