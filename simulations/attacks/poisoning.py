"""One poisoned site of five: it turns its update round and makes it longer.

Fang et al. 2020, "Local model poisoning attacks", in its simplest form: -`FACTOR` times the honest
update. It is not long enough for admission to leave it out (`federation.norm_limit`); what remains
is what the strategy stands.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from medfl.common import config
from medfl.common.errors import FederationError
from medfl.common.messages import Instruction, Reply
from medfl.common.packing import is_packed
from medfl.common.seeds import derive
from medfl.common.study import Study
from medfl.server.rounds import run_study
from medfl.simulations.direct import Change, Direct
from medfl.simulations.sites import SimulatedRun, find_hospitals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTOR, FEATURES, PATIENTS, ROUNDS = 6.0, 6, 200, 8
NAMES = tuple(f"site-{n}" for n in range(5))
STRATEGIES = ("fedavg", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median")


def turning(poisoned: frozenset[str]) -> Change:
    """These sites' updates come turned round."""

    def change(asked: Instruction, reply: Reply) -> Reply:
        return turned(reply) if reply.site in poisoned and asked.kind == "round" else reply

    return change


def turned(reply: Reply) -> Reply:
    """-FACTOR times the update."""
    if is_packed(reply.delta):
        raise FederationError("This attack turns plain updates: federation.updates = float32.")
    worse = {n: (-FACTOR * a).astype(a.dtype) for n, a in reply.delta.items()}
    return replace(reply, delta=worse)


def run(seed: int = 0, strategies: Sequence[str] = STRATEGIES) -> dict[str, tuple[float, float]]:
    """By strategy: accuracy on the honest sites' test patients, with nobody and one poisoned."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        _write_tables(folder, seed)
        found = {}
        for name in strategies:
            honest = accuracy(folder, name, frozenset(), seed)
            found[name] = honest, accuracy(folder, name, frozenset({NAMES[0]}), seed)
        return found


def accuracy(folder: Path, strategy: str, poisoned: frozenset[str], seed: int) -> float:
    """Mean over the sites that are never poisoned."""
    study = _study(strategy)
    planned = SimulatedRun(
        "main",
        study,
        find_hospitals(study, folder, folder / "cache"),
        folder / "runs" / f"{strategy}-{len(poisoned)}",
    )
    hospitals = [planned.hospital(node) for node in range(1, len(NAMES) + 1)]
    outcome = run_study(study, Direct(hospitals, turning(poisoned)), seed=seed)
    known = [r.metrics["test"].get("accuracy") for r in outcome.final if r.site != NAMES[0]]
    return float(np.mean([value for value in known if value is not None]))


def draw(found: Mapping[str, tuple[float, float]], figure: Figure) -> None:
    """Two bars a strategy."""
    from medfl.server.report.plot import BLUE, GREY, VERMILION, only_grid

    axes = figure.subplots()
    places = np.arange(len(found))
    honest, attacked = zip(*found.values(), strict=True)
    axes.bar(places - 0.2, honest, 0.38, color=BLUE, label="five honest sites")
    axes.bar(places + 0.2, attacked, 0.38, color=VERMILION, label="one of them poisoned")
    axes.axhline(0.5, color=GREY, lw=1, ls=":")
    axes.set_xticks(places, [name.replace("_", "\n") for name in found])
    axes.set_ylim(0, 1)
    axes.set_title("Accuracy at the honest sites")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    only_grid(axes)


def _write_tables(folder: Path, seed: int) -> None:
    """One CSV a site: a noisy sum of some numbers decides."""
    rng = np.random.default_rng(derive(seed, "tables"))
    truth = rng.normal(size=FEATURES)
    for name in NAMES:
        x = rng.normal(size=(PATIENTS, FEATURES))
        y = rng.random(PATIENTS) < 1 / (1 + np.exp(-2 * (x @ truth)))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow([*(f"f{n}" for n in range(FEATURES)), "label", "split"])
            for n in range(PATIENTS):
                split = "test" if n % 2 == 0 else "train"
                lines.writerow([*(f"{v:.6f}" for v in x[n]), "yes" if y[n] else "no", split])


def _study(strategy: str) -> Study:
    sites = [{"name": n, "data": {"format": "table", "path": f"{n}.csv"}} for n in NAMES]
    plain = {
        "name": "poisoning",
        "task": {"kind": "risk", "classes": ["no", "yes"]},
        "record": {"features": [{"name": f"f{n}"} for n in range(FEATURES)], "scale": "none"},
        "model": {"name": "logistic"},
        "training": {"learning_rate": 0.3, "batch_size": 20, "local_epochs": 1},
        "federation": {"rounds": ROUNDS, "strategy": strategy, "min_sites": len(NAMES)},
        "evaluation": {"split": "given", "validation": 0.0, "bootstrap": 0},
        "simulation": {"sites": sites},
    }
    return config.parse(plain, Study, "poisoning")
