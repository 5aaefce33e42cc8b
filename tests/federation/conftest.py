"""Five small make-believe hospitals as files, and a way to spoil what they answer."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client.hospital import Hospital, answer
from medfl.common import config
from medfl.common.errors import MedflError
from medfl.common.messages import Instruction, Reply, refusal
from medfl.common.packing import is_packed, pack, read_head, unpack
from medfl.common.study import Study
from medfl.server.rounds import Outcome, run_study
from medfl.simulations.sites import SimulatedRun, find_hospitals

Spoil = Callable[[Instruction, Reply], Reply]
N_FEATURES = 6
NAMES = [f"h{i}" for i in range(5)]


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One CSV a hospital: 60 to 100 patients whose risk is a noisy sum of six numbers."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(11)
    truth = np.array([1.5, -1.0, 0.8, 0.0, -0.6, 0.4])
    for number, name in enumerate(NAMES):
        n = 60 + 10 * number
        x = rng.normal(loc=0.1 * number, size=(n, N_FEATURES))
        y = rng.random(n) < 1 / (1 + np.exp(-2 * (x @ truth)))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow([*(f"f{i}" for i in range(N_FEATURES)), "label", "split"])
            for i in range(n):
                split = "test" if i % 3 == 0 else "train"
                lines.writerow([*(f"{v:.6f}" for v in x[i]), "yes" if y[i] else "no", split])
    return folder


@pytest.fixture(scope="session")
def table_study() -> Callable[..., Study]:
    """The study of these tables; keywords change its [federation]."""

    def make(*, model: dict[str, Any] | None = None, **federation: Any) -> Study:
        sites = [
            {"name": name, "data": {"format": "table", "path": f"{name}.csv"}} for name in NAMES
        ]
        return config.parse(
            {
                "name": "tables",
                "task": {"kind": "risk", "classes": ["no", "yes"]},
                "record": {
                    "features": [{"name": f"f{i}"} for i in range(N_FEATURES)],
                    "scale": "none",
                },
                "model": model or {"name": "logistic"},
                "training": {"learning_rate": 0.1, "batch_size": 16, "local_epochs": 1},
                "federation": {"rounds": 10, **federation},
                "evaluation": {"split": "given", "validation": 0.0, "bootstrap": 0},
                "simulation": {"sites": sites},
            },
            Study,
            "study",
        )

    return make


class Spoiled:
    """Simulated hospitals in this process; `spoil` may change a reply on its way."""

    def __init__(self, hospitals: Sequence[Hospital], spoil: Spoil) -> None:
        self._hospitals, self._spoil = hospitals, spoil

    def names(self) -> list[str]:
        return [str(i) for i in range(len(self._hospitals))]

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for address, asked in instructions:
            hospital = self._hospitals[int(address)]
            try:
                reply = answer(hospital, asked)
            except MedflError as error:
                reply = refusal(hospital.name, error, asked.round)
            yield self._spoil(asked, reply)


def as_told(asked: Instruction, reply: Reply) -> Reply:
    return reply


@pytest.fixture
def federate(tables: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Run a study over the hospitals' files: federate(study, spoil)."""
    runs = iter(range(1000))

    def run(study: Study, spoil: Spoil = as_told, seed: int = 1) -> Outcome:
        found = find_hospitals(study, tables, tmp_path / "cache")
        planned = SimulatedRun("main", study, found, tmp_path / f"run-{next(runs)}")
        hospitals = [planned.hospital(node) for node in range(1, len(found) + 1)]
        return run_study(study, Spoiled(hospitals, spoil), seed=seed)

    return run


def opened_and(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    """Change the parameters inside an update, packed or not."""

    def spoil(asked: Instruction, reply: Reply) -> Reply:
        if asked.kind != "round":
            return reply
        if not is_packed(reply.delta):
            return replace(reply, delta=change(dict(reply.delta)))
        shapes = {n: a.shape for n, a in asked.weights.items()}
        kind = read_head(reply.delta, shapes).kind
        return replace(reply, delta=pack(change(unpack(reply.delta, shapes)), kind))

    return spoil


@pytest.fixture(scope="session")
def tampered() -> Callable[[Callable[[dict[str, Any]], dict[str, Any]]], Spoil]:
    """tampered(change): a spoiler that changes the parameters inside each update."""
    return opened_and
