"""The same study on Flower's own simulation engine: what `flwr run .` runs.

[tool.flwr.app.config] in pyproject.toml holds the four settings. The server and every node read the
same ones, so all of them know the same hospitals: partition i is the i-th in order of names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from medfl.client.data.cases import Cohort
from medfl.client.flower import client_app as app_of_client
from medfl.client.hospital import Hospital
from medfl.common.errors import ConfigError, DataError, FederationError
from medfl.common.noise import key_from
from medfl.common.study import Study, load_study
from medfl.common.tensors import Tensors
from medfl.server.flower import FlowerSites
from medfl.server.flower import server_app as app_of_server
from medfl.server.rounds import Outcome, RoundRecord, run_study
from medfl.simulations.run import MAIN, single_thread
from medfl.simulations.sites import OpenHospitals, SimulatedRun, find_hospitals

STUDIES = Path(__file__).resolve().parent / "studies"
# Studies whose hospitals are made here if no data are named, and the folder that those lie in.
MADE_UP = {"demo_classification": "classification", "demo_segmentation": "segmentation"}
# Flower starts the server before it has registered all nodes; after this long no more will come.
NODES_SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is asked for. data: None = made-up hospitals below `out`."""

    study: Path
    data: Path | None
    out: Path
    seed: int


def settings_of(config: Mapping[str, object]) -> Settings:
    """The run config as settings; relative paths start where the local SuperLink was started.

    Raises:
        ConfigError: a setting is absent, of another type, or names nothing that is there.
    """
    texts = {}
    for name in ("study", "data", "out"):
        value = config.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"run config: {name} must be a text; write {name}='\"...\"'")
        texts[name] = value
    seed = config.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError("run config: seed must be a whole number, such as seed=42")
    study = study_file(texts["study"])
    if not texts["data"] and study.stem not in MADE_UP:
        raise ConfigError(
            f"run config: data is empty, which only {' and '.join(MADE_UP)} can do without. "
            "Name the folder of the data by its absolute path"
        )
    return Settings(
        study=study,
        data=Path(texts["data"]).resolve() if texts["data"] else None,
        out=Path(texts["out"] or f"runs/flower-{study.stem}").resolve(),
        seed=seed,
    )


def study_file(name: str) -> Path:
    """A study of medfl's own by its name, or any by its path. Raises ConfigError."""
    own = STUDIES / f"{name}.toml"
    if own.parent == STUDIES and own.is_file():
        return own
    file = Path(name).resolve()
    if not file.is_file():
        names = ", ".join(sorted(p.stem for p in STUDIES.glob("*.toml")))
        raise ConfigError(
            f"run config: study {name!r}: there is no file {file}. "
            f"Give the absolute path of a study file, or one of: {names}"
        )
    return file


def planned(settings: Settings) -> SimulatedRun:
    """The study and its hospitals in order of names. Raises ConfigError."""
    from medfl.simulations.cli import default_cache

    study = load_study(settings.study)
    data = settings.data or made_up(settings) / MADE_UP[settings.study.stem]
    return SimulatedRun(MAIN, study, find_hospitals(study, data, default_cache()), settings.out)


def made_up(settings: Settings) -> Path:
    """Where the made-up hospitals of a run without data lie."""
    return settings.out / "hospitals"


def find_hospital(context: Context) -> Hospital:
    """The hospital of a node; a node too many gets one without data, which takes no part.

    Raises:
        ConfigError: the run config is wrong, or the context is not one of a simulation.
    """
    single_thread()
    opened, study, n_hospitals = _opened(settings_of(context.run_config))
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int):
        raise ConfigError("This app is for Flower's simulation: a node has no partition-id here.")
    if partition >= n_hospitals:
        return without_data(f"no-hospital-{partition + 1}", study)
    return opened.find(1, partition + 1)


@lru_cache(maxsize=1)
def _opened(settings: Settings) -> tuple[OpenHospitals, Study, int]:
    run = planned(settings)
    return OpenHospitals({1: run}), run.study, len(run.names)


def without_data(name: str, study: Study) -> Hospital:
    """A site that refuses every question."""

    def nothing() -> Cohort:
        raise DataError("There are more nodes than hospitals; this node takes no part.")

    return Hospital(name=name, study=study, load_cohort=nothing, folder=Path())


def main(sites: FlowerSites, context: Context) -> None:
    """Run the study and leave in `out` what `medfl-simulate run` leaves there.

    Raises:
        MedflError: whatever a person can do something about; Flower marks the run as failed.
    """
    from medfl.simulations.progress import LiveProgress
    from medfl.simulations.results import RoundLog

    started = time.monotonic()
    single_thread()
    settings = settings_of(context.run_config)
    run = prepared(settings)
    greet(run, count_nodes(sites, len(run.names)), made=settings.data is None)
    length = {MAIN: run.study.federation.rounds}
    with closing(RoundLog(run.folder)) as rounds, LiveProgress(length) as progress:

        def note(record: RoundRecord, weights: Tensors) -> None:
            rounds.write(record)
            progress.show(record)

        outcome = run_study(
            run.study,
            sites,
            seed=settings.seed,
            run=MAIN,
            noise_key=key_from(settings.seed, "coordinator"),
            on_round=note,
        )
    conclude(run, outcome, settings.seed, time.monotonic() - started)


def conclude(run: SimulatedRun, outcome: Outcome, seed: int, seconds: float) -> None:
    """Write models, result.json and the report, and say how it went."""
    from medfl.server.report import write_report
    from medfl.simulations.cli import summary_text
    from medfl.simulations.results import environment, write_results

    about = environment("cpu", 0) | {"engine": "Flower simulation runtime"}
    del about["workers"]  # Ray's own affair
    result = write_results([run], {MAIN: outcome}, seed=seed, seconds=seconds, environment=about)
    write_report(run.folder)
    print(summary_text(result, run.folder), flush=True)


def prepared(settings: Settings) -> SimulatedRun:
    """Make room for the results, and the hospitals where no data are named. Raises ConfigError."""
    import shutil

    from medfl.simulations.cli import make_room

    run = None if settings.data is None else planned(settings)
    moved = make_room(settings.out)
    if moved is not None:
        print(f"Earlier results moved to {moved}", flush=True)
    shutil.copyfile(settings.study, settings.out / "study.toml")
    if run is None:
        from medfl.simulations.hospitals import make_hospitals

        make_hospitals(made_up(settings))
        run = planned(settings)
    return run


def count_nodes(sites: FlowerSites, enough: int) -> int:
    """How many nodes there are, once there are `enough` or no more come."""
    seen, since = 0, time.monotonic()
    while seen < enough and time.monotonic() - since < NODES_SETTLE_S:
        if (now := len(sites.names())) > seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)
    return len(sites.names())


def greet(run: SimulatedRun, n_nodes: int, *, made: bool) -> None:
    """Say what is about to run.

    Raises:
        FederationError: fewer nodes than hospitals: some would be left out unseen. Made-up ones
            may be left out, so that `flwr run .` does something with Flower's default of two.
    """
    n_hospitals = len(run.names)
    remedy = f"--federation-config 'num-supernodes={n_hospitals} client-resources-num-cpus=1'"
    if n_nodes < n_hospitals:
        words = f"{n_hospitals} hospitals need as many nodes, and Flower simulates {n_nodes}."
        if not made:
            raise FederationError(f"{words} Start the run with {remedy}")
        print(f"{words} The first {n_nodes} take part. For all: {remedy}", flush=True)
    print(
        f"{run.study.title or run.study.name}: {min(n_nodes, n_hospitals)} sites, "
        f"{run.study.federation.rounds} rounds of {run.study.federation.strategy}. "
        f"Results go to {run.folder}",
        flush=True,
    )


client_app = app_of_client(find_hospital)
server_app = app_of_server(main)
