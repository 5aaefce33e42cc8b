"""What updates cost on the wire, and what the model is worth: float32, float16, int8, int4.

The study is `simulations/studies/pneumonia.toml` (PneumoniaMNIST, small CNN, five hospitals) in
half its rounds, under each `federation.updates` and five seeds; MEDFL_BENCH_DATA names its data's
folder. With --small, or without that folder, the images are made up, and the row says so. Bytes are
those of one hospital's update in one round as it travels, against float32 as it lies in memory. A
loss is the mean over the seeds of float32's AUROC minus the kind's, on all test images; it is
compared with the half width of the metric's own 95 % interval (bootstrap over test patients).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from medfl.client.data.own import cores
from medfl.common.noise import key_from
from medfl.common.packing import KINDS, Kind
from medfl.common.study import Study, load_study
from medfl.server.rounds import run_study
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.direct import Direct
from medfl.simulations.results import summary
from medfl.simulations.run import preload
from medfl.simulations.sites import SimulatedRun, find_hospitals

STUDY = Path(__file__).parents[1] / "studies" / "pneumonia.toml"
METRIC = "auroc"
# The share of float32's bytes that a kind must stay below.
_SHARES: dict[Kind, float] = {"int8": 1 / 4, "int4": 1 / 8}


@dataclass(frozen=True, slots=True)
class Ended:
    """One run. sent: bytes of an update, a round each. raw: as float32. half: of the interval."""

    sent: list[float]
    raw: int
    auroc: float
    half: float


def rows(small: bool) -> list[Row]:
    """A row a kind."""
    named = os.environ.get("MEDFL_BENCH_DATA")
    study = load_study(STUDY)
    study = replace(study, federation=replace(study.federation, rounds=3 if small else 10))
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as place:
        folder = Path(place)
        if small or named is None:
            data, images = folder / "made-up", "made-up images"
            write_images(data, 160 if small else 2000)
        else:
            data, images = Path(named), "PneumoniaMNIST"
        seeds = range(42, 44) if small else range(42, 47)
        jobs = [(study, data, folder, kind, seed) for seed in seeds for kind in KINDS]
        with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
            ended = list(pool.map(_run, *zip(*jobs, strict=True)))
        found = {k: [e for e, job in zip(ended, jobs, strict=True) if job[3] == k] for k in KINDS}
    return [row_of(kind, found[kind], found["float32"], images) for kind in KINDS]


def row_of(kind: Kind, ended: list[Ended], whole: list[Ended], images: str) -> Row:
    """ended, whole: runs of the same seeds, the latter with float32."""
    raw = whole[0].raw
    lost = np.array([w.auroc - e.auroc for w, e in zip(whole, ended, strict=True)])
    half = float(np.mean([w.half for w in whole]))
    quantile = float(stats.t.ppf(0.975, len(lost) - 1))
    own = quantile * float(lost.std(ddof=1)) / len(lost) ** 0.5
    return Row(
        work=f"{images}, small CNN, an update as {kind}",
        medfl=Spread.of([n for one in ended for n in one.sent]),
        rivals={"float32_raw": Spread.of([raw])},
        unit="bytes",
        limit=raw * _SHARES[kind] if kind in _SHARES else None,
        agree=bool(lost.mean() <= half),
        notes={
            METRIC: Spread.of([one.auroc for one in ended]).values,
            "lost": float(lost.mean()),
            "lost_95": [float(lost.mean()) - own, float(lost.mean()) + own],
            "metric_half_interval": half,
        },
    )


def _run(study: Study, data: Path, folder: Path, kind: Kind, seed: int) -> Ended:
    preload(study)
    study = replace(study, federation=replace(study.federation, updates=kind))
    if kind != "float32":  # whose interval is asked for
        study = replace(study, evaluation=replace(study.evaluation, bootstrap=0))
    hospitals = find_hospitals(study, data, folder / f"cache-{os.getpid()}")
    run = SimulatedRun("main", study, hospitals, folder / f"{kind}-{seed}")
    key = key_from(seed, "coordinator")
    outcome = run_study(study, Direct.of(run), seed=seed, noise_key=key)
    told = summary(run, {"main": outcome}, run, seed)
    low, high = told["all_intervals"].get(METRIC, (0.0, 0.0))
    trained = [r for r in outcome.records if r.bytes_up]
    return Ended(
        sent=[r.bytes_up / len(r.sites) for r in trained],
        raw=sum(a.nbytes for a in outcome.weights.values() if a.dtype == np.float32),
        auroc=float(told["all"][METRIC]),
        half=(high - low) / 2,
    )


def write_images(folder: Path, n: int) -> None:
    """`n` training and n / 2 test images in MedMNIST's form; of one class a corner is brighter."""
    rng = np.random.default_rng(0)
    parts: dict[str, Any] = {}
    for part, count in (("train", n), ("test", n // 2)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        images = rng.integers(0, 200, (count, 28, 28)).astype(np.uint8)
        images[labels == 1, :9, :9] += rng.integers(0, 25, (count // 2, 9, 9)).astype(np.uint8)
        parts |= {f"{part}_images": images, f"{part}_labels": labels[:, None]}
    folder.mkdir()
    np.savez(folder / "made_up.npz", **parts)
