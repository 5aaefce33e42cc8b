"""The table of docs/scale.md follows from what was measured, by straight lines."""

from __future__ import annotations

from typing import Any

import pytest

from medfl.simulations.benchmarks.scale_table import idle_share, lines_of, table


def run(n: int, model: float, seconds: float, memory: float) -> dict[str, Any]:
    sizes = {"coordinator": memory, "engine": 1e8, "disk_after": 2e6 + n * 1e5, "model": model}
    return {"medfl": {"median": seconds}, "notes": {"hospitals": n, "bytes": sizes}}


def call(nodes: int, kind: str, seconds: float) -> dict[str, Any]:
    return {"medfl": {"median": seconds}, "notes": {"nodes": nodes, "kind": kind}}


# 1 + 0.2 n + 0.01 n M seconds; 400 MB + 2 MB n of memory beside the engine's 100.
ROWS = [
    run(10, 0.0, 3.0, 4.2e8),
    run(50, 0.0, 11.0, 5.0e8),
    run(10, 1e7, 4.0, 9.9e8),
    call(100, "pull", 0.02),
    call(50, "pull", 0.5),
    call(100, "heartbeat", 0.04),
]


def test_lines_by_hand() -> None:
    lines = lines_of(ROWS)
    assert lines.seconds == pytest.approx((1.0, 0.2, 0.01))
    assert lines.memory == pytest.approx((5e8, 2e6))
    assert lines.disk == pytest.approx((2e6, 1e5))
    assert lines.call_s == {"pull": 0.02, "heartbeat": 0.04}


def test_waiting_hospitals_by_hand() -> None:
    """A pull of 0.02 s every 10 s and a heartbeat of 0.04 s every 20 s: 0.4 % of a SuperLink."""
    assert idle_share(lines_of(ROWS), 100) == pytest.approx(0.4)


def test_a_line_of_the_table_by_hand() -> None:
    """100 hospitals, 100 MB: 1 + 100 (0.2 + 1) s; 15 GB; 0.5 + 0.2 + 0.3 GB; 5.4 GB of files."""
    line = table(lines_of(ROWS), 100.0, 0.5)[3]
    assert line == "| 100 | 15 GB | 121 | 1 GB | 5.4 GB | 40 % |"
