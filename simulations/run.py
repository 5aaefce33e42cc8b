"""One study over many sites on one machine, with its comparisons, all by the deployed code.

study + data -> hospitals -> runs (the study itself; per --compare: local, pooled, no_privacy,
                                   a strategy)
runs -> one pool of forked workers; each run's coordinator is a thread over its own LocalGrid
outcomes + the sites' score files -> result.json, rounds.jsonl, models, report
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from medfl.client.flower import client_app
from medfl.common import tensors
from medfl.common.errors import ConfigError, Interrupted
from medfl.common.noise import key_from
from medfl.common.study import Study
from medfl.common.tensors import Tensors
from medfl.server.flower import FlowerSites
from medfl.server.rounds import Outcome, RoundRecord, run_study
from medfl.simulations.grid import LocalGrid, Worker
from medfl.simulations.pool import Pool
from medfl.simulations.results import RoundLog
from medfl.simulations.sites import OpenHospitals, SimulatedHospital, SimulatedRun
from medfl.strategies.catalogue import STRATEGIES, strategy_for

MAIN = "main"
NO_PRIVACY = "no_privacy"


@dataclass(frozen=True, slots=True)
class Machine:
    """How the machine is used; none of it changes a result on the CPU.

    workers: processes that train. device: of the training, such as cpu or cuda.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    device: str = "cpu"


def plan_runs(
    study: Study,
    hospitals: Sequence[SimulatedHospital],
    out: Path,
    compare: Sequence[str],
    device: str,
) -> list[SimulatedRun]:
    """The main run and one a comparison.

    Raises:
        ConfigError: a comparison that is no strategy, `local`, `pooled` or `no_privacy`.
    """
    main = SimulatedRun(MAIN, study, tuple(hospitals), out, device)
    strategy_for(study)
    runs = [main]
    # Who only evaluates is no part of what the federated model is compared with.
    base = replace(main, hospitals=tuple(h for h in hospitals if not h.policy.evaluate_only))
    unprotected = tuple(replace(h, privacy=None) for h in base.hospitals)
    for name in dict.fromkeys(compare):
        folder = out / "baselines" / name
        if name == "pooled":
            pooled = as_pooled(study, len(base.hospitals))
            runs.append(replace(base, name=name, study=pooled, folder=folder, pooled=True))
        elif name == NO_PRIVACY:
            other = replace(study, privacy=None, site_privacy=None)
            runs.append(replace(base, name=name, study=other, folder=folder, hospitals=unprotected))
        elif name in STRATEGIES:
            other = study.with_strategy(name)
            if name == "local":
                # Nothing of a hospital leaves it, so that there is nobody to be protected from:
                # alone, a hospital would train without noise, and that is what it compares with.
                other = replace(other, privacy=None, site_privacy=None)
            if study.federation.keep == "average" and STRATEGIES[name]().local.keeps != "nothing":
                # What stays at a hospital is not averaged.
                other = replace(other, federation=replace(other.federation, keep="last"))
            strategy_for(other)
            whose = unprotected if name == "local" else base.hospitals
            runs.append(replace(base, name=name, study=other, folder=folder, hospitals=whose))
        else:
            raise ConfigError(
                f"--compare {name}: is not known; use pooled, {NO_PRIVACY} or one of "
                f"{', '.join(STRATEGIES)}"
            )
    return runs


def as_pooled(study: Study, n_sites: int) -> Study:
    """The study as it would be if all data lay in one place, which is what federation does without.

    It takes as many optimiser steps as all hospitals together (with local_epochs that is so by
    itself), no privacy and no masks, because nobody would have to be protected from anybody.
    """
    steps = study.training.local_steps
    return replace(
        study,
        training=replace(study.training, local_steps=None if steps is None else steps * n_sites),
        federation=replace(
            study.federation, strategy="fedavg", options=None, min_sites=1, sites_per_round=None
        ),
        privacy=None,
        secure_aggregation=None,
        site_privacy=None,
    )


def run_all(
    runs: Sequence[SimulatedRun],
    *,
    seed: int,
    machine: Machine,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
) -> dict[str, Outcome]:
    """Outcomes by run name. The same seed gives the same bits for any number of workers.

    Raises:
        Interrupted: Ctrl-C; finished rounds, and the weights after them, are on disk.
        MedflError: what ended the main run or a comparison.
    """
    by_id = dict(enumerate(runs, start=1))
    opened = OpenHospitals(by_id)
    preload(runs[0].study)
    # What was imported stays; workers need not look through it, nor copy its pages by doing so.
    gc.freeze()
    gc.enable()
    app = client_app(lambda context: opened.find(context.run_id, context.node_id))
    worker = Worker(app)
    latest: dict[str, Tensors] = {}
    with (
        closing(RoundLog(runs[0].folder)) as rounds,
        Pool(worker.work, machine.workers, single_thread, worker.keep) as pool,
    ):

        def note(record: RoundRecord, weights: Tensors) -> None:
            latest[record.run] = weights
            rounds.write(record)
            on_round(record)

        def one(run_id: int, run: SimulatedRun) -> Outcome:
            sites = FlowerSites(LocalGrid(pool, run_id, len(run.names)))
            key = key_from(seed, "coordinator")
            return run_study(
                run.study, sites, seed=seed, run=run.name, noise_key=key, on_round=note
            )

        threads = ThreadPoolExecutor(len(runs), thread_name_prefix="coordinator")
        futures = {run.name: threads.submit(one, i, run) for i, run in by_id.items()}
        try:
            _wait(futures.values())
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped. {_kept(runs, latest, rounds.path)}") from None
        finally:
            # Waiting coordinators end with their pool, and nobody writes once the log is closed.
            pool.close()
            threads.shutdown(cancel_futures=True)
            gc.unfreeze()
    return {name: future.result() for name, future in futures.items()}


def _kept(runs: Sequence[SimulatedRun], latest: Mapping[str, Tensors], log_file: Path) -> str:
    """Write the weights of runs that were stopped; says what is on disk."""
    if not latest:
        return "No round was finished yet; nothing is kept."
    for run in runs:
        if run.name in latest:
            tensors.save(latest[run.name], run.folder / "model_last.safetensors")
    return (
        f"The rounds that were finished are in {log_file}, the weights after them in "
        "model_last.safetensors beside it."
    )


def _wait(futures: Collection[Future[Outcome]]) -> None:
    """Wait in short steps, so that Ctrl-C is noticed; the first error ends everything."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def preload(study: Study) -> None:
    """Import here what every worker needs, so that a fork shares it."""
    from medfl.common.models import MODELS

    needed = [
        "medfl.client.training.loop",
        "medfl.client.training.predict",
        MODELS[study.model.name].needs,
    ]
    if study.evaluation.split == "shuffled":
        needed.append("sklearn.model_selection")
    if study.privacy is not None:
        needed += ["opacus.accountants.analysis.prv", "opacus.accountants.analysis.rdp"]
    for name in needed:
        importlib.import_module(name)
    single_thread()


def single_thread() -> None:
    """One thread a worker: sites run side by side, and sums do not depend on the machine."""
    import torch

    torch.set_num_threads(1)


def choose_device(wanted: str) -> str:
    """cpu or cuda; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: an unknown name, or cuda where there is none (no silent fall-back).
    """
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {wanted}: must be one of auto, cpu, cuda")
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    return "cuda" if wanted != "cpu" and there else "cpu"
