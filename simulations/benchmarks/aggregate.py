"""A round's updates as one model: seconds an update, and memory, of what strategies do with them.

Updates stream by, one at a time, into `combine` and the server's step, as `medfl.server.rounds` has
them. Seconds are those that the strategy takes, without the making of the updates. The limit counts
bytes: a sum in float64 reads an update and the sum and writes the sum, 20 bytes a number, and a
plain numpy addition of arrays of the same sizes shows at what rate one core can; half of that rate
is twice its seconds. Memory is the kernel's high-water mark over what the process had before,
counted in models, and includes the model itself. Results are compared with float64.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from medfl.common import resting
from medfl.common.messages import Reply
from medfl.common.tensors import Tensors
from medfl.simulations.benchmarks import aggregate_reference as reference
from medfl.simulations.benchmarks.processes import peak_bytes
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.strategies.catalogue import STRATEGIES, WEIGHTINGS
from medfl.strategies.strategy import ServerState

_WIDTH = 1000
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Load:
    """So many updates of so many bytes, by one strategy."""

    strategy: str
    updates: int
    megabytes: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the model's only parameter."""
        return int(self.megabytes * 1e6 / 4 / _WIDTH), _WIDTH


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one load. update_s: an update each, with its share of the round's end.

    bytes_: over what the process had before.
    """

    update_s: list[float]
    bytes_: int
    agree: bool


def rows(small: bool) -> list[Row]:
    """Two rows, seconds and memory, a streaming strategy; a row a robust one."""
    streamed = (8, 4.0) if small else (100, 100.0)
    held = (8, 1.0) if small else (20, 20.0)
    found: list[Row] = []
    for name in ("fedavg", "fedadam"):
        found += _streamed(Load(name, *streamed))
    return found + [_held(Load(name, *held)) for name in reference.RULES]


def _streamed(load: Load) -> list[Row]:
    measured, add_s = _compared(load)
    number = load.shape[0] * load.shape[1]
    one = Row(
        work=f"{_work(load)}, an update",
        medfl=Spread.of(measured.update_s),
        rivals={"numpy_add": Spread.of(add_s)},
        unit="s",
        limit=2 * median(add_s),
        agree=measured.agree,
        notes={
            "GB_a_second": 20e-9 * number / median(measured.update_s),
            "numpy_add_GB_a_second": 20e-9 * number / median(add_s),
        },
    )
    models = measured.bytes_ / (load.megabytes * 1e6)
    large = load.megabytes * 1e6 > resting.IN_MEMORY_BYTES
    limit = 3.0 if large else None  # small sums are in memory on purpose
    work = f"{_work(load)}, peak memory"
    return [one, Row(work, Spread.of([models]), {}, "models", limit, measured.agree)]


def _held(load: Load) -> Row:
    measured, add_s = _compared(load)
    return Row(
        work=f"{_work(load)}, an update",
        medfl=Spread.of(measured.update_s),
        rivals={"numpy_add": Spread.of(add_s)},
        unit="s",
        agree=measured.agree,
        notes={"models": measured.bytes_ / (load.megabytes * 1e6)},
    )


def _work(load: Load) -> str:
    return f"{load.updates} updates of {load.megabytes:g} MB, {load.strategy}"


def _compared(load: Load) -> tuple[Measured, list[float]]:
    """`measure` in a fresh process, whose high-water mark is its own; numpy before and after."""
    add_s = _additions(load.shape)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        measured = pool.submit(measure, load).result()
    return measured, add_s + _additions(load.shape)


def measure(load: Load) -> Measured:
    """Two rounds of one load; the second one, whose optimiser has a state, is measured."""
    strategy, weighting = STRATEGIES[load.strategy](), WEIGHTINGS["cases"]
    before = _resident()
    weights: Tensors = {"w": first(load)}
    state, seconds = ServerState(), [0.0]
    history, seen = [], reference.rows_of(load.strategy)
    for round_ in range(_ROUNDS):
        stream = Stream(load, round_, weights["w"])
        combined = strategy.combine(stream, weighting)
        new, state = strategy.server_step(weights, combined.delta, state)
        end_s = time.perf_counter() - stream.ended
        seconds = [s + end_s / load.updates for s in stream.update_s]
        history.append(weights["w"][seen].copy())
        weights = new
        del combined, new
    used = peak_bytes(os.getpid()) - before
    agree = reference.agrees(load.strategy, load.updates, history, weights["w"][seen])
    return Measured(seconds, used, agree)


def first(load: Load) -> NDArray[np.float32]:
    """The model that round 1 starts from."""
    rng = np.random.default_rng(1)
    return rng.standard_normal(load.shape, dtype=np.float32)


class Stream:
    """A round's updates, made one at a time. update_s: what was done with each. ended: when."""

    def __init__(self, load: Load, round_: int, weights: NDArray[np.float32]) -> None:
        self._load, self._round, self._weights = load, round_, weights
        self.update_s: list[float] = []
        self.ended = 0.0

    def __iter__(self) -> Iterator[Reply]:
        for site in range(self._load.updates):
            delta = reference.update(self._weights, site, self._round)
            reply = Reply(site=f"{site:03}", n_cases=reference.cases(site), delta={"w": delta})
            del delta
            given = time.perf_counter()
            yield reply
            self.update_s.append(time.perf_counter() - given)
            del reply  # else it would lie in memory while the next one is made
        self.ended = time.perf_counter()


def _additions(shape: tuple[int, int]) -> list[float]:
    """Seconds of sum += update in numpy, a float64 and a float32 array."""
    total, one = np.zeros(shape), np.ones(shape, np.float32)
    return [_timed(lambda: np.add(total, one, out=total)) for _ in range(7)]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
