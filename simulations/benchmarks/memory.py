"""The coordinator's peak memory with many hospitals: it must not grow with their number.

A real coordinator (`medfl-server start`: its own process and the engine's), light hospitals on
its gateway. Peaks are the kernel's high-water marks of resident memory. What remains with a model
of 30 kB is the constant; the rest is counted in models.
"""

from __future__ import annotations

from medfl.simulations.benchmarks.crowd import measured
from medfl.simulations.benchmarks.rows import Row, Spread

ROUNDS = 2


def rows(small: bool) -> list[Row]:
    """A row a number of hospitals; its unit is the size of the model."""
    sizes, counts = ((0.03, 10.0), (2,)) if small else ((0.03, 100.0), (4, 32))
    return [_row(count, *sizes) for count in counts]


def _row(count: int, nothing: float, megabytes: float) -> Row:
    empty, full = measured(count, nothing, ROUNDS), measured(count, megabytes, ROUNDS)
    models, model_bytes = sum(full.peaks.values()) - sum(empty.peaks.values()), full.bytes_["model"]
    return Row(
        work=f"{megabytes:g} MB model, {count} hospitals, coordinator's peak memory",
        medfl=Spread.of([models / model_bytes]),
        rivals={},
        unit="models",
        limit=3.0,
        agree=full.agree,
        notes={"bytes": full.peaks, "constant_bytes": empty.peaks, "model_bytes": model_bytes},
    )
