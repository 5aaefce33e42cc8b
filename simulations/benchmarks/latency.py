"""Seconds of a round beyond training, two hospitals, against stock Flower deployed.

Both federations stand side by side; runs alternate. A round's seconds are the coordinator's (from
the first message to the new model); "training" is the slowest hospital's step in the plain loop,
the same number for both. The first round of a run, in which modules are loaded, is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from medfl.simulations.benchmarks import plain
from medfl.simulations.benchmarks.deployed import Deployed, Ended
from medfl.simulations.benchmarks.plain import Weights, same
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.benchmarks.stock import Stock
from medfl.simulations.benchmarks.work import Work, first_weights

SITES = ("north", "south")


def rows(small: bool) -> list[Row]:
    """A row a size of model."""
    sizes = (0.03,) if small else (0.03, 100.0)
    return [_row(Work(size, 2 if small else 4, SITES), 1 if small else 3) for size in sizes]


def _row(work: Work, repeats: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as folder, ExitStack() as ends:
        ours, stock = Deployed(Path(folder) / "medfl"), Stock(Path(folder) / "flower")
        ends.callback(ours.end)
        ends.callback(stock.end)
        _begin(ours, work)
        stock.start(len(SITES))
        first = first_weights(work.write_study(Path(folder) / "study.toml"))
        expected, plain_s = plain.loop(first, len(SITES), work.rounds)
        training, beyond, rival = median(plain_s), list[float](), list[float]()
        agree = True
        for _ in range(repeats):
            own = ours.run()
            beyond += [r["seconds"] - training for r in own.rounds[1:]]
            model, seconds = stock.run(first, work.rounds, len(SITES))
            rival += [s - training for s in seconds[1:]]
            agree &= _agree(own, model, expected)
    return Row(
        work=f"{work.megabytes:g} MB model, {len(SITES)} hospitals, a round beyond training",
        medfl=Spread.of(beyond),
        rivals={"flower": Spread.of(rival)},
        unit="s",
        limit=1.5 if work.megabytes < 1 else 4.0,
        agree=agree,
        notes={"training_s": training, "rounds": len(beyond)},
    )


def _begin(federation: Deployed, work: Work) -> None:
    federation.start()
    federation.publish(work)
    for site, name in enumerate(SITES):
        federation.join(name, site)


def _agree(own: Ended, *others: Weights) -> bool:
    whole = all(not r["void"] and not r["left_out"] for r in own.rounds)
    return whole and _all_same(own.weights, others)


def _all_same(weights: Weights, others: Sequence[Weights]) -> bool:
    return all(same(other, weights) for other in others)
