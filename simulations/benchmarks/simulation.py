"""`medfl-simulate run` on PneumoniaMNIST against the plain loop in two processes, Flower and FLARE.

Seconds of whole processes, from the command to its last file, with one computing thread each; the
runs alternate. medfl starts with an empty cache and leaves models, metrics with intervals, logs and
a report; the plain loops leave a model. All train the same cases in the same order.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common import tensors
from medfl.common.errors import ConfigError, FederationError
from medfl.simulations.benchmarks import rivals, shares
from medfl.simulations.benchmarks.plain import Weights, apart
from medfl.simulations.benchmarks.processes import Processes, descendants, own_bytes
from medfl.simulations.benchmarks.rows import Row, Spread
from medfl.simulations.benchmarks.shares import ImageWork

COMMANDS = ("medfl-simulate", "medfl-client", "medfl-server")
# Relative to an array's largest number. 400 steps make 2e-5 of the last bit of float32, by which a
# loss differs that is summed up otherwise; another order of the cases makes 1e-2. DenseNet121's
# rounding grows to more than this on some processors, so it is measured, too: models agree within
# a few times what the plain loop is from itself after another last bit in each first weight.
TOLERANCE = 1e-4
ROUNDING = 3.0
# DenseNet121's biases begin at 0 and are 4e-5 after two rounds, where rounding has come to 4e-8.
SMALL = 1e-2
_LAST = "plain loop, channels last"


def rows(small: bool) -> list[Row]:
    """Rows of the work at each size, of the way to the first step, and of each command's help."""
    if small:
        work = ImageWork("cnn", 4, rounds=2)
        return [_row(work, shares.made_up(), 1, {}), _start("cnn", shares.made_up(), 1), *_helps(1)]
    found = collection()
    works = [ImageWork("cnn", n) for n in (4, 16, 64, 256)]
    works.append(ImageWork("densenet121", 4, most=4 * 80))
    others = rivals.installed()
    told = [_row(work, found, 3, others) for work in works]
    starts = [_start(model, found, 5) for model in _USED]
    return [*told, _memory(found), *starts, *_helps(5)]


def collection() -> dict[str, NDArray[Any]]:
    """PneumoniaMNIST's images. Raises ConfigError where MEDFL_DATA does not lead to them."""
    folder = Path(os.environ.get("MEDFL_DATA", "")) / "pneumoniamnist"
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ConfigError(
            "MEDFL_DATA: names no folder with pneumoniamnist/*.npz; download it there"
        )
    with np.load(files[0]) as file:
        wanted = [f"{part}_{kind}" for part in ("train", "val") for kind in ("images", "labels")]
        return {name: file[name] for name in wanted}


def _row(
    work: ImageWork,
    found: dict[str, NDArray[Any]],
    repeats: int,
    others: dict[str, rivals.Rival | str],
) -> Row:
    """medfl and the others in turn. A rival that is a text could not be installed."""
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        folder = Path(name)
        shares.write(work, found, folder)
        runs: dict[str, Callable[[], Weights]] = {
            "medfl": lambda: _medfl(folder),
            "plain loop": lambda: _plain(folder),
            # Not the limit: what is left to gain once the loop has medfl's order in memory, too.
            _LAST: lambda: _plain(folder, "last"),
        }
        for rival, how in others.items():
            if not isinstance(how, str):
                runs[rival] = lambda how=how: how(folder)  # type: ignore[misc]
        failed = {rival: how for rival, how in others.items() if isinstance(how, str)}
        seconds: dict[str, list[float]] = {who: [] for who in runs}
        models: dict[str, Weights] = {}
        for _ in range(repeats):
            for who, run in runs.items():
                if who not in failed:
                    started = time.monotonic()
                    try:
                        models[who] = run()
                    except (FederationError, OSError) as error:
                        if who not in others:
                            raise
                        failed[who] = str(error)[-500:]
                    else:
                        seconds[who].append(time.monotonic() - started)
        nudged = _plain(folder, "nudged")
    expected = models["plain loop"]
    allowed = max(TOLERANCE, ROUNDING * apart(nudged, expected, SMALL))
    distance = {who: apart(model, expected, SMALL) for who, model in models.items()}
    limit = median(seconds["plain loop"]) * (1.05 if work.model == "densenet121" else 1.15)
    return Row(
        work=str(work),
        medfl=Spread.of(seconds["medfl"]),
        rivals={who: Spread.of(s) for who, s in seconds.items() if who != "medfl" and s},
        unit="s",
        limit=limit,
        agree=all(d <= allowed for d in distance.values()),
        notes={"apart": distance, "allowed": allowed} | ({"failed": failed} if failed else {}),
    )


def _medfl(folder: Path) -> Weights:
    _clean(folder)
    Processes(folder, {}).done("medfl-simulate", *_simulate(folder))
    return tensors.load(folder / "out" / "model.safetensors")


def _clean(folder: Path) -> None:
    for old in ("out", "cache"):
        shutil.rmtree(folder / old, ignore_errors=True)


def _simulate(folder: Path) -> list[str]:
    wanted = {"--data": "data", "--out": "out", "--cache": "cache"}
    paths = [str(part) for option, path in wanted.items() for part in (option, folder / path)]
    script = Path(sys.executable).with_name("medfl-simulate")
    return [str(script), "run", str(folder / "study.toml"), *paths, "--seed", str(shares.SEED)]


def _plain(folder: Path, *how: str) -> Weights:
    script = Path(__file__).with_name("images.py")
    Processes(folder, {}).done("the plain loop", sys.executable, str(script), str(folder), *how)
    return rivals.model_of(folder / "model.npz")


def _memory(found: dict[str, NDArray[Any]]) -> Row:
    """The most memory that all processes of a run have together, of many sites and of few."""
    many = _peak(ImageWork("cnn", 1000, sampled=20), found)
    few = _peak(ImageWork("cnn", 10), found)
    return Row(
        work="cnn, 1000 sites, 20 of them a round: memory of all processes",
        medfl=Spread.of([many]),
        rivals={"10 sites": Spread.of([few])},
        unit="MB",
        limit=1.2 * few,
    )


def _peak(work: ImageWork, found: dict[str, NDArray[Any]]) -> float:
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        folder, most = Path(name), 0
        shares.write(work, found, folder)
        processes = Processes(folder, {})
        try:
            run = processes.start("medfl-simulate", *_simulate(folder))
            while run.poll() is None:
                most = max(most, sum(map(own_bytes, descendants(run.pid))))
                time.sleep(0.05)
        finally:
            processes.end()
        if run.returncode:
            raise FederationError((folder / "medfl-simulate.log").read_text()[-500:])
        return most / 1e6


# A medfl-simulate whose workers write down when a round's training begins.
_NOTICED = """
import os, sys, time
from medfl.simulations import pool

original = pool._loop

def noticed(*args):
    if "torch" in sys.modules:
        from medfl.client.training import loop
        train = loop._train_plain

        def first(*more):
            with open(os.environ["FIRST_STEPS"], "a") as file:
                file.write(f"{time.monotonic()}\\n")
            return train(*more)

        loop._train_plain = first
    original(*args)

pool._loop = noticed
from medfl.simulations.cli import main
sys.exit(main(sys.argv[1:]))
"""
_USED = {"cnn": "torch", "densenet121": "torch, monai.networks.nets.densenet"}


def _start(model: str, found: dict[str, NDArray[Any]], repeats: int) -> Row:
    """From the command to the first training step, against importing what the study uses."""
    ours, imports = [], []
    with tempfile.TemporaryDirectory(prefix="medfl-bench-") as name:
        folder, steps = Path(name), Path(name) / "first-steps"
        shares.write(ImageWork(model, 4, rounds=1, most=160), found, folder)
        processes = Processes(folder, {"FIRST_STEPS": str(steps)})
        for _ in range(repeats):
            _clean(folder)
            steps.unlink(missing_ok=True)
            started = time.monotonic()
            processes.done("start", sys.executable, "-c", _NOTICED, *_simulate(folder)[1:])
            ours.append(min(map(float, steps.read_text().split())) - started)
            say = f"import {_USED[model]}, time; print(time.monotonic())"
            started = time.monotonic()
            imports.append(float(processes.done("import", sys.executable, "-c", say)) - started)
    return Row(
        work=f"{model}: from the command to the first training step",
        medfl=Spread.of(ours),
        rivals={f"importing {_USED[model]}": Spread.of(imports)},
        unit="s",
        limit=1.5 * median(imports),
    )


def _helps(repeats: int) -> list[Row]:
    """Each command's help, in a process of its own."""
    told = []
    for command in COMMANDS:
        script = str(Path(sys.executable).with_name(command))
        seconds = []
        for _ in range(repeats):
            started = time.monotonic()
            Processes(Path.cwd(), {}).done(command, script, "--help")
            seconds.append(time.monotonic() - started)
        told.append(Row(f"{command} --help", Spread.of(seconds), {}, "s", 0.3))
    return told
