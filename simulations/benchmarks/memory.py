"""The coordinator's peak memory with many hospitals: it must not grow with their number.

A real coordinator (`medfl-server start`: its own process and the engine's), light hospitals on
its gateway. Peaks are the kernel's high-water marks of resident memory. What remains with a model
of 30 kB is the constant; the rest is counted in models.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from medfl.common.tensors import Array, Tensors
from medfl.simulations.benchmarks.deployed import Deployed
from medfl.simulations.benchmarks.light import update
from medfl.simulations.benchmarks.plain import same, table
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.benchmarks.work import Work, first_weights

ROUNDS = 2


def rows(small: bool) -> list[Row]:
    """A row a number of hospitals; its unit is the size of the model."""
    sizes, counts = ((0.03, 10.0), (2,)) if small else ((0.03, 100.0), (4, 32))
    return [_row(count, *sizes) for count in counts]


def _row(count: int, nothing: float, megabytes: float) -> Row:
    empty, _, _ = _measured(count, nothing)
    full, agree, model_bytes = _measured(count, megabytes)
    models = sum(full.values()) - sum(empty.values())
    return Row(
        work=f"{megabytes:g} MB model, {count} hospitals, coordinator's peak memory",
        medfl=Spread.of([models / model_bytes]),
        rivals={},
        unit="models",
        limit=3.0,
        agree=agree,
        notes={"bytes": full, "constant_bytes": empty, "model_bytes": model_bytes},
    )


def _measured(count: int, megabytes: float) -> tuple[dict[str, int], bool, int]:
    names = tuple(f"site-{i:03}" for i in range(count))
    work = Work(megabytes, ROUNDS, names)
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as folder:
        federation = Deployed(Path(folder) / "medfl")
        try:
            federation.start()
            federation.publish(work)
            first = first_weights(work.write_study(Path(folder) / "study.toml"))
            _join(federation, names, first)
            ended = federation.run()
            whole = all(not r["void"] and not r["left_out"] for r in ended.rounds)
            agree = whole and same(expected(first, names), ended.weights)
            model_bytes = sum(a.nbytes for a in first.values())
            return federation.peaks(), agree, model_bytes
        finally:
            federation.end()


def _join(federation: Deployed, names: tuple[str, ...], first: Tensors) -> None:
    hospitals = []
    for site, name in enumerate(names):
        options = federation.enrol(name, site)
        hospitals.append({"state": options[1], "site": options[3]})
    about = {"shapes": {n: a.shape for n, a in first.items()}, "hospitals": hospitals}
    file = federation.folder / "light.json"
    file.write_text(json.dumps(about), encoding="utf-8")
    federation.processes.start(
        "light", sys.executable, "-m", "medfl.simulations.benchmarks.light", str(file)
    )
    federation.processes.until("light", "all connected")


def expected(first: Tensors, names: tuple[str, ...], rounds: int = ROUNDS) -> dict[str, Array]:
    """The model after all rounds, summed here in one pass."""
    weights = {name: a.astype(np.float64) for name, a in first.items()}
    shapes = {name: a.shape for name, a in first.items()}
    cases = [len(table(site)[1]) for site in range(len(names))]
    for round_ in range(1, rounds + 1):
        for name, n in zip(names, cases, strict=True):
            for key, delta in update(name, round_, shapes).items():
                weights[key] += n / sum(cases) * delta
    return {name: a.astype(np.float32) for name, a in weights.items()}
