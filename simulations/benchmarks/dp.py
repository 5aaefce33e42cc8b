"""A step of DP-SGD against a plain step of the same batch: time and memory, on all cores.

Rivals are stock Opacus's hooks and `torch.func`; the plain step is what privacy costs nothing in.
Steps alternate within one process; memory is each way's own process, above what the model and the
batch take. The limit is the aim, in plain steps.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from medfl.simulations.benchmarks.dp_steps import WAYS, WORKS
from medfl.simulations.benchmarks.processes import Processes
from medfl.simulations.benchmarks.rows import Row, Spread

# How far a clipped sum in float32 may be from torch.func's, of its length; or so many times as far
# from that in float64 as the nearest rival's, where rounding alone takes a network farther.
NEAR, ROUNDING = 1e-3, 3.0


def rows(small: bool) -> list[Row]:
    """A row of time and one of memory for each work."""
    chosen = ["small"] if small else [name for name in WORKS if name != "small"]
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as folder:
        processes = Processes(Path(folder), {})
        return [
            row
            for name in chosen
            for row in (_time(processes, name, 2 if small else 7), _memory(processes, name))
        ]


def _time(processes: Processes, name: str, repeats: int) -> Row:
    load = os.getloadavg()[0]
    told = _child(processes, name, "time", repeats)
    ms = {way: Spread.of([1e3 * s for s in found]) for way, found in told["seconds"].items()}
    plain = ms["plain"].median
    pairs = zip(told["seconds"]["medfl"], told["seconds"]["plain"], strict=True)
    return Row(
        work=f"{WORKS[name].text}, a private step",
        medfl=ms["medfl"],
        rivals={way: spread for way, spread in ms.items() if way != "medfl"},
        unit="ms",
        limit=WORKS[name].within * plain,
        agree=_is_near(told["apart"], told["apart64"]),
        notes={
            "over_plain": {way: spread.median / plain for way, spread in ms.items()},
            "median_of_paired_ratios": median(own / other for own, other in pairs),
            "noise_ms": 1e3 * told["noise"],
            "over_plain_without_noise": (ms["medfl"].median - 1e3 * told["noise"]) / plain,
            "sums_apart": told["apart"],
            "sums_from_float64": told["apart64"],
            "load_before": load,
        },
    )


def _is_near(apart: dict[str, float], apart64: dict[str, float]) -> bool:
    nearest = min(distance for way, distance in apart64.items() if way != "medfl")
    return apart["medfl"] < NEAR or apart64["medfl"] <= ROUNDING * nearest


def _memory(processes: Processes, name: str) -> Row:
    told = {way: _child(processes, name, way, 3) for way in WAYS}
    mb = {way: Spread.of([found["bytes"] / 1e6]) for way, found in told.items()}
    within = WORKS[name].memory_within
    return Row(
        work=f"{WORKS[name].text}, memory of a step",
        medfl=mb["medfl"],
        rivals={way: spread for way, spread in mb.items() if way != "medfl"},
        unit="MB",
        limit=None if within is None else within * mb["plain"].median,
        notes={
            "over_plain": {way: spread.median / mb["plain"].median for way, spread in mb.items()},
            "process_mb": {way: found["process_bytes"] / 1e6 for way, found in told.items()},
        },
    )


def _child(processes: Processes, name: str, how: str, repeats: int) -> dict[str, Any]:
    module = "medfl.simulations.benchmarks.dp_steps"
    said = processes.done("dp_steps", sys.executable, "-m", module, name, how, str(repeats))
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found
