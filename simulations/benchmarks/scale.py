"""What hospitals cost the coordinator, by their number: the parts of the table in docs/scale.md.

A real coordinator with light hospitals on its gateway (`light`), of which one process carries many,
and `calls`, which asks a SuperLink through the gate as fast as it answers. Seconds are those of the
rounds after the first, the making of the made-up updates among them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from medfl.client import enrolment
from medfl.client.premises import Home
from medfl.server import authority
from medfl.server.settings import open_federation
from medfl.simulations.benchmarks import calls
from medfl.simulations.benchmarks.deployed import Deployed
from medfl.simulations.benchmarks.memory import expected
from medfl.simulations.benchmarks.plain import same
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.benchmarks.work import Work, first_weights, write_hospital

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run. seconds: of each round but the first. bytes_: of processes, disk and wire."""

    seconds: list[float]
    bytes_: dict[str, int]
    agree: bool


def rows(small: bool) -> list[Row]:
    """A row a number of hospitals and size of model; then calls a second."""
    runs = [(3, 0.03)] if small else [(10, 0.03), (40, 0.03), (80, 0.03), (10, 10.0)]
    nodes = (5,) if small else (50, 500)
    return [_row(*run) for run in runs] + [r for n in nodes for r in _calls(n, 0.5 if small else 5)]


def _row(count: int, megabytes: float) -> Row:
    cost = measured(count, megabytes)
    return Row(
        work=f"{count} light hospitals, {megabytes:g} MB model, a round",
        medfl=Spread.of(cost.seconds),
        rivals={},
        unit="s",
        agree=cost.agree,
        notes={"hospitals": count, "bytes": cost.bytes_},
    )


def _calls(nodes: int, seconds: float) -> list[Row]:
    found = calls.rates(nodes, seconds)
    return [
        Row(
            work=f"{nodes} nodes, a {kind} at the SuperLink",
            medfl=Spread.of([1 / rate]),
            rivals={},
            unit="s",
            notes={"nodes": nodes, "kind": kind},
        )
        for kind, rate in found.items()
    ]


def measured(count: int, megabytes: float) -> Cost:
    """One run with so many hospitals."""
    names = tuple(f"site-{i:03}" for i in range(count))
    work = Work(megabytes, ROUNDS, names)
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
            bytes_ = federation.peaks() | {
                "disk_before": before,
                "disk_after": after,
                "up": int(median(r["bytes_up"] for r in ended.rounds)),
                "down": int(median(r["bytes_down"] for r in ended.rounds)),
                "model": sum(a.nbytes for a in first.values()),
            }
            agree = whole and same(expected(first, names, ROUNDS), ended.weights)
            return Cost([r["seconds"] for r in ended.rounds[1:]], bytes_, agree)
        finally:
            federation.end()


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
