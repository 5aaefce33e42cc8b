"""docs/scale.md's tables from a results file: `python -m medfl.simulations.benchmarks.scale_table`.

Straight lines through what was measured (`scale`), by the number of hospitals n and the size of the
model M in MB: a round takes a + b n + c n M seconds, the coordinator's processes d + e n bytes
beside three models (`memory`), the disk f + g n beside the model's own files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from medfl.simulations.benchmarks.compare import read

COUNTS = (10, 100, 1_000, 10_000)
# A waiting hospital's calls: a held pull looks every 10 s, and a heartbeat comes every 20 s.
IDLE_CALLS = {"pull": 1 / 10, "heartbeat": 1 / 20}
# On disk: two checkpoints, the model itself, and its chunks for whoever fetches them.
MODEL_FILES = 4


@dataclass(frozen=True, slots=True)
class Lines:
    """Coefficients of what one more hospital, and one more MB of its model, costs.

    seconds: (a, b, c) of a + b n + c n M. memory, disk: (d, e) of d + e n bytes. call_s: by kind,
    of the run with the most nodes.
    """

    seconds: tuple[float, float, float]
    memory: tuple[float, float]
    disk: tuple[float, float]
    call_s: Mapping[str, float]


def lines_of(rows: Sequence[Mapping[str, Any]]) -> Lines:
    """Least squares over the rows of one file of `scale`; no coefficient is below 0."""
    runs = [row for row in rows if "hospitals" in row["notes"]]
    n = np.array([row["notes"]["hospitals"] for row in runs], dtype=float)
    model = np.array([row["notes"]["bytes"]["model"] for row in runs]) / 1e6
    seconds = np.array([row["medfl"]["median"] for row in runs])
    small = model < 1

    def of(*names: str) -> Any:
        return np.array([sum(row["notes"]["bytes"][name] for name in names) for row in runs])

    calls = sorted((r for r in rows if "nodes" in r["notes"]), key=lambda r: r["notes"]["nodes"])
    return Lines(
        tuple(_fitted(seconds, np.ones_like(n), n, n * model)),
        tuple(_fitted(of("coordinator", "engine")[small], np.ones(small.sum()), n[small])),
        tuple(_fitted(of("disk_after")[small], np.ones(small.sum()), n[small])),
        {row["notes"]["kind"]: row["medfl"]["median"] for row in calls},
    )


def _fitted(values: Any, *columns: Any) -> Any:
    matrix = np.stack(columns, axis=1)
    scale = matrix.max(axis=0)  # the columns are of very different sizes
    found, _ = nnls(matrix / scale, np.asarray(values, dtype=float))
    return (found / scale).tolist()


def idle_share(lines: Lines, hospitals: int) -> float:
    """The share of its time that a SuperLink needs for hospitals that wait for work."""
    return hospitals * sum(often * lines.call_s[kind] for kind, often in IDLE_CALLS.items())


def table(lines: Lines, megabytes: float, update: float) -> list[str]:
    """Markdown, a line a number of hospitals. update: its share of the model's bytes."""
    a, b, c = lines.seconds
    told = [
        f"| hospitals, {megabytes:g} MB | wire, a round | s, a round | memory | disk | idle |",
        "|---|---|---|---|---|---|",
    ]
    for n in COUNTS:
        wire = n * megabytes * (1 + update) / 1e3
        memory = (lines.memory[0] + n * lines.memory[1]) / 1e9 + 3 * megabytes / 1e3
        files = megabytes * (MODEL_FILES + n * update) / 1e3
        disk = (lines.disk[0] + n * lines.disk[1]) / 1e9 + files
        told.append(
            f"| {n:,} | {wire:.3g} GB | {a + n * (b + c * megabytes):,.0f} | {memory:.2g} GB "
            f"| {disk:.2g} GB | {100 * idle_share(lines, n):.3g} % |"
        )
    return told


def main(argv: Sequence[str]) -> int:
    """Print the lines and two tables. argv: a results file of `scale`."""
    lines = lines_of(read(Path(argv[0])))
    print(lines, *table(lines, 0.03, 0.93), *table(lines, 100.0, 0.93), sep="\n")
    share = idle_share(lines, 1)
    print(f"waiting hospitals fill a SuperLink at {1 / share:,.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
