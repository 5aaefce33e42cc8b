"""Reading a hospital's images: cached epochs, the first reading of DICOM, memory.

cached     training from the cache's files against the same training from arrays in memory
DICOM      the first reading of compressed CT (find, read, check, split, prepare, cache) against
           decoding the same files and nothing else, both on all cores
memory     of the first reading and as many steps, a cohort four times as large against the smaller
           one: what cannot be given back (anonymous memory). Without the reading processes, which
           hold one case each and whose peaks differ by more than a cohort's list is long
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data import store
from medfl.client.data.cohort import build_cohort
from medfl.client.data.own import cores
from medfl.client.data.preprocess import Facts, Prepared
from medfl.client.encoding import Selected, case_set
from medfl.client.readers import sandbox
from medfl.client.training.caseset import CaseSet
from medfl.client.training.loop import train
from medfl.client.training.plan import TrainPlan
from medfl.common import config
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.site import Cache
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.common.tensors import digest
from medfl.simulations.benchmarks import data_dicom
from medfl.simulations.benchmarks.processes import anonymous_bytes
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.run import single_thread

_STUDY = """
name = "benchmark"
[task]
kind = "{kind}"
classes = ["no", "yes"]
[image]
dimensions = {dimensions}
size = {size}
intensity = "none"
[model]
name = "{model}"
[training]
learning_rate = 1e-8 # CT comes in Hounsfield units, on which a real step would diverge
batch_size = {batch}
local_steps = {steps}
[federation]
rounds = 1
strategy = "fedavg"
min_sites = 1
[evaluation]
split = "hash"
test = 0.0
validation = 0.0
"""
_READ = (32, 32, 32)


@dataclass(frozen=True, slots=True)
class Cached:
    """Training of some steps on cases that lie in the cache."""

    size: tuple[int, ...]
    cases: int
    batch: int
    steps: int
    repeats: int


def rows(small: bool) -> list[Row]:
    """Two rows of training, one of reading, one of memory."""
    single_thread()
    if small:
        trained = [Cached((32, 32), 12, 4, 2, 1), Cached((16, 16, 16), 4, 2, 2, 1)]
        series, slices, side = 4, 3, 64
    else:
        # More than the 256 MiB up to which a part is held in memory.
        trained = [Cached((64, 64), 17_000, 32, 30, 5), Cached((64, 64, 64), 280, 2, 8, 5)]
        series, slices, side = 16, 24, 256
    return [*map(_cached, trained), _reading(series, slices, side), _memory(series, slices, side)]


def study_of(model: str, size: tuple[int, ...], batch: int, steps: int) -> Study:
    """Of images of this size; a `unet` segments, a `cnn` classifies."""
    kind = "segmentation" if model == "unet" else "classification"
    text = _STUDY.format(
        kind=kind, dimensions=len(size), size=list(size), model=model, batch=batch, steps=steps
    )
    return config.parse(tomllib.loads(text), Study, "benchmark")


def _cached(work: Cached) -> Row:
    study = study_of("unet", work.size, work.batch, work.steps)
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as folder:
        cache = Cache(path=Path(folder), max_gb=8.0)
        stored = store.build_entry(cache, "0" * 64, _made(work))
        names = tuple(str(i) for i in range(work.cases))
        where = np.arange(work.cases)
        inputs, masks = stored.inputs, stored.masks
        if not isinstance(inputs, np.ndarray) or not isinstance(masks, np.ndarray):
            raise TypeError("all cases have one shape")
        cached = CaseSet(Selected(inputs, where), _masks(masks, where), names, names)
        held = CaseSet(np.array(inputs), np.array(masks), names, names)
        seconds: dict[str, list[float]] = {"cached": [], "held": []}
        models = set()
        for repeat in range(work.repeats + 1):
            for name, cases in (("cached", cached), ("held", held)):
                took, model = _trained(study, cases)
                models.add(model)
                if repeat:  # the first time loads modules
                    seconds[name].append(took)
    return Row(
        work=f"{work.steps} steps on {work.cases} cached cases of {work.size}, batch {work.batch}",
        medfl=Spread.of(seconds["cached"]),
        rivals={"in_memory": Spread.of(seconds["held"])},
        unit="s",
        limit=Spread.of(seconds["held"]).median / 0.98,
        agree=len(models) == 1,
    )


def _masks(masks: Any, where: NDArray[np.int64]) -> Any:
    """`CaseSet` wants bytes, and `Selected` gives what lies there, which these are."""
    return Selected(masks, where)


def _made(work: Cached) -> Iterator[Prepared]:
    rng = np.random.default_rng(3)
    for _ in range(work.cases):
        image = rng.standard_normal((1, *work.size), dtype=np.float32)
        facts = Facts(work.size, (), -1.0, 0.0, 1.0)
        yield Prepared(image, (image[0] > 1).astype(np.uint8), facts)


def _trained(study: Study, cases: CaseSet) -> tuple[float, str]:
    model = build_model(study, Shared(), seed=7)
    started = time.perf_counter()
    train(model, cases, study, Shared(), TrainPlan(1, 1, 11))
    return time.perf_counter() - started, digest(get_weights(model))


def _reading(series: int, slices: int, side: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        folder = Path(name)
        data_dicom.write(folder / "ct", series, slices, side)
        study = study_of("cnn", _READ, 2, 1)
        one_s, one = _read(folder, study, 1)
        all_s, many = _read(folder, study, cores())
        decode_s = data_dicom.decoding_s(folder / "ct")
        again_s, _ = _read(folder, study, cores())
    return Row(
        work=f"first reading of {series} CT series of {slices} slices of {side}², JPEG 2000",
        medfl=Spread.of([all_s, again_s]),
        rivals={"one_job": Spread.of([one_s]), "decoding_alone": Spread.of([decode_s])},
        unit="s",
        agree=one == many,
        notes={"cores": cores()},
    )


def _read(folder: Path, study: Study, jobs: int) -> tuple[float, str]:
    """Seconds, the start of the reading processes among them, and a digest of what was read."""
    sandbox.close()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        started = time.perf_counter()
        cohort = build_cohort(
            data_dicom.source(folder / "ct"), study, cache=Cache(path=Path(cache)), n_jobs=jobs
        )
        took = time.perf_counter() - started
        inputs = {str(i): np.asarray(cohort.inputs[i]) for i in range(len(cohort.cases))}
        return took, digest(inputs | {"targets": np.asarray(cohort.targets)})


def _memory(series: int, slices: int, side: int) -> Row:
    few, many = (_apart(n, slices, side, 2 * series) for n in (series, 4 * series))
    return Row(
        work=f"{4 * series} CT series of {slices} slices of {side}²: memory over {series} series'",
        medfl=Spread.of([many / few]),
        rivals={},
        unit="x",
        limit=1.1,
        notes={"bytes": {"few": few, "many": many}},
    )


def _apart(series: int, slices: int, side: int, steps: int) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_used, series, slices, side, steps).result()


def _used(series: int, slices: int, side: int, steps: int) -> int:
    """Peak of the first reading and of training from the cache."""
    single_thread()
    from medfl.client import encoding

    encoding.IN_MEMORY_BYTES = 0  # small as these cohorts are, they are read from the cache
    study = study_of("cnn", _READ, 2, steps)
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        folder = Path(name)
        data_dicom.write(folder / "ct", series, slices, side)
        with _peak() as peak:
            cohort = build_cohort(
                data_dicom.source(folder / "ct"),
                study,
                cache=Cache(path=folder / "cache"),
                n_jobs=cores(),
            )
            _trained(study, case_set(study, Shared(), cohort, "train"))
    return peak[0]


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The most anonymous memory of this process, looked at 50 times a second."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], anonymous_bytes(os.getpid()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()
