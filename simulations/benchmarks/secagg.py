"""What a secure sum costs: rounds of one study with and without masks, in turn, in one process.

Real hospitals and the real coordinator, training (a few steps, far fewer than a hospital takes) and
everything else but the network, which `latency` measures. Hospitals answer one after another, so
that a round's seconds are the work of all. `Cost.apart` counts them as if each had its own machine:
of each step the slowest hospital's time, and the coordinator's own. The first round of a run loads
modules and holds plain updates on disk; it is not counted.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from medfl.client.hospital import Hospital, answer
from medfl.common import config
from medfl.common.messages import Instruction, Reply, pack
from medfl.common.secure.rings import RINGS
from medfl.common.study import Study
from medfl.common.tensors import Tensors
from medfl.server.rounds import Outcome, RoundRecord, run_study
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.run import single_thread
from medfl.simulations.sites import SimulatedRun, find_hospitals

_FEATURES = 6
_CASES = 48


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one round. seconds: wall-clock, all in one process.

    apart: as if each hospital had its own machine, without the network. bytes_up: of all answers,
    bytes_down: of all instructions, arrays and text.
    """

    seconds: float
    apart: float
    bytes_up: int
    bytes_down: int


def rows(small: bool) -> list[Row]:
    """A row a number of hospitals; limit: 1.3 times the plain round's median."""
    single_thread()
    if small:
        return [_row(sites=3, hidden=64, steps=2, rounds=2, repeats=1)]
    return [
        _row(sites=10, hidden=3160, steps=10, rounds=3, repeats=3),
        _row(sites=100, hidden=3160, steps=2, rounds=2, repeats=1),
    ]


def _row(*, sites: int, hidden: int, steps: int, rounds: int, repeats: int) -> Row:
    costs: dict[bool, list[Cost]] = {False: [], True: []}
    ended: dict[bool, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        folder = Path(name)
        write_table(folder)
        for repeat in range(repeats):
            for secure in (False, True):
                study = study_of(sites, hidden, steps, rounds, secure=secure)
                found, ended[secure] = measured(folder, study, f"{repeat}-{secure}")
                costs[secure] += found[1:]
    n = sum(a.size for a in ended[True].weights.values())
    plain, masked = ([c.seconds for c in costs[s]] for s in (False, True))
    return Row(
        work=f"{n / 1e6:.3g} M parameters, {sites} hospitals, {steps} steps, a round's work of all",
        medfl=Spread.of(masked),
        rivals={"plain": Spread.of(plain)},
        unit="s",
        limit=1.3 * median(plain),
        agree=_agree(ended, sites),
        notes={
            "plain": _told(costs[False]),
            "secure": _told(costs[True]),
            "ratio": median(masked) / median(plain),
            "ratio_apart": median(c.apart for c in costs[True])
            / median(c.apart for c in costs[False]),
        },
    )


def _told(costs: list[Cost]) -> dict[str, float]:
    return {name: median(c[name] for c in map(asdict, costs)) for name in Cost.__annotations__}


def _agree(ended: dict[bool, Outcome], sites: int) -> bool:
    """Whether the models differ by what rounding explains: half a step a round, and float32's."""
    records = [r for outcome in ended.values() for r in outcome.records]
    step = 1.0 / RINGS["float32"].levels(sites)
    plain, masked = ended[False].weights, ended[True].weights
    apart = max(float(np.abs(a - masked[n]).max(initial=0.0)) for n, a in plain.items())
    whole = all(not r.void and not r.left_out for r in records)
    return whole and apart <= 100 * (step + 2.0**-24)


def study_of(sites: int, hidden: int, steps: int, rounds: int, *, secure: bool) -> Study:
    """A network of two layers of `hidden`, trained for a few steps at each of so many hospitals."""
    names = [f"h{i:03}" for i in range(sites)]
    return config.parse(
        {
            "name": "cost",
            "task": {"kind": "risk", "classes": ["no", "yes"]},
            "record": {"features": [{"name": f"f{i}"} for i in range(_FEATURES)], "scale": "none"},
            "model": {"name": "mlp", "options": {"hidden": [hidden, hidden]}},
            "training": {"learning_rate": 0.01, "batch_size": 32, "local_steps": steps},
            "federation": {"rounds": rounds, "min_sites": 2},
            "evaluation": {"split": "given", "validation": 0.0, "bootstrap": 0},
            "simulation": {
                "sites": [{"name": n, "data": {"format": "table", "path": "t.csv"}} for n in names]
            },
            **({"secure_aggregation": {}} if secure else {}),
        },
        Study,
        "study",
    )


def write_table(folder: Path) -> None:
    """The patients, the same ones for each hospital."""
    rng = np.random.default_rng(0)
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow([*(f"f{i}" for i in range(_FEATURES)), "label", "split"])
        for i in range(_CASES + 3):
            x = rng.normal(size=_FEATURES)
            said = "yes" if x.sum() > 0 else "no"
            lines.writerow([*(f"{v:.4f}" for v in x), said, "train" if i >= 3 else "test"])


def measured(folder: Path, study: Study, run: str) -> tuple[list[Cost], Outcome]:
    """The cost of each round of a run over the hospitals in `folder`."""
    planned = SimulatedRun("main", study, find_hospitals(study, folder, folder / "c"), folder / run)
    sites = _Timed([planned.hospital(node + 1) for node in range(len(planned.hospitals))])
    costs: list[Cost] = []

    def note(record: RoundRecord, weights: Tensors) -> None:
        del weights
        if record.round <= study.federation.rounds:
            costs.append(sites.cost(record.seconds))

    sites.begin()
    # Under "main" training with masks has the seed of training without, and both are comparable.
    outcome = run_study(study, sites, seed=1, run="main", on_round=note)
    return costs, outcome


@dataclass
class _Timed:
    """Hospitals in this process, with a stopwatch at each answer."""

    hospitals: list[Hospital]
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bytes_up: int = 0
    bytes_down: int = 0

    def names(self) -> list[str]:
        return [str(i) for i in range(len(self.hospitals))]

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for address, asked in instructions:
            if asked.kind in ("prepare", "finish"):
                yield answer(self.hospitals[int(address)], asked)
                continue
            started = time.perf_counter()
            reply = answer(self.hospitals[int(address)], asked)
            self.took[asked.kind].append(time.perf_counter() - started)
            self.bytes_up += _size(reply)
            self.bytes_down += _size(asked)
            yield reply

    def begin(self) -> None:
        self.took.clear()
        self.bytes_up = self.bytes_down = 0

    def cost(self, seconds: float) -> Cost:
        """Since `begin`, which it does again."""
        at_hospitals = sum(sum(times) for times in self.took.values())
        slowest = sum(max(times) for times in self.took.values())
        cost = Cost(seconds, seconds - at_hospitals + slowest, self.bytes_up, self.bytes_down)
        self.begin()
        return cost


def _size(message: Any) -> int:
    envelope = pack(message)
    arrays = sum(a.nbytes for group in envelope.arrays.values() for a in group.values())
    return len(envelope.about) + int(arrays)
