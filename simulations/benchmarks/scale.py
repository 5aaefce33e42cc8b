"""What hospitals cost the coordinator, by their number: the parts of the table in docs/scale.md.

A real coordinator with light hospitals on its gateway (`light`), of which one process carries many,
and `calls`, which asks a SuperLink through the gate as fast as it answers. Seconds are those of the
rounds after the first, the making of the made-up updates among them.
"""

from __future__ import annotations

from medfl.simulations.benchmarks import calls
from medfl.simulations.benchmarks.crowd import measured
from medfl.simulations.benchmarks.rows import Row, Spread

ROUNDS = 3


def rows(small: bool) -> list[Row]:
    """A row a number of hospitals and size of model; then calls a second."""
    runs = [(3, 0.03)] if small else [(10, 0.03), (40, 0.03), (80, 0.03), (10, 10.0)]
    nodes = (5,) if small else (50, 500)
    return [_row(*run) for run in runs] + [r for n in nodes for r in _calls(n, 0.5 if small else 5)]


def _row(count: int, megabytes: float) -> Row:
    cost = measured(count, megabytes, ROUNDS)
    return Row(
        work=f"{count} light hospitals, {megabytes:g} MB model, a round",
        medfl=Spread.of(cost.seconds),
        rivals={},
        unit="s",
        agree=cost.agree,
        notes={"hospitals": count, "bytes": cost.peaks | cost.bytes_},
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
