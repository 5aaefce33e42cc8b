"""What a finished simulation leaves on disk."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medfl.common import tensors
from medfl.common.errors import StorageError
from medfl.common.messages import Reply
from medfl.common.metrics import default_metrics, intervals, mean_over_sites, summarise
from medfl.common.metrics.outcomes import outcomes as outcomes_of
from medfl.common.metrics.scores import Scores, concatenate, load
from medfl.common.seeds import derive
from medfl.common.study import Study, Task
from medfl.server.ending import ended_early
from medfl.server.records import bytes_per_round, finite
from medfl.server.rounds import Outcome, RoundRecord
from medfl.simulations.elsewhere import elsewhere
from medfl.simulations.sites import SimulatedRun
from medfl.strategies.catalogue import strategy_for
from medfl.strategies.home import published_part


class RoundLog:
    """rounds.jsonl and TensorBoard events, written as rounds end; several runs may write."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary

        self.path = folder / "rounds.jsonl"
        with storing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
        self._folder = folder / "tensorboard"
        self._make_writer, self._Summary, self._Value = SummaryWriter, Summary, Summary.Value
        self._writers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def write(self, record: RoundRecord) -> None:
        """Append one round. Raises StorageError, and then the file ends with the round before."""
        with self._lock, storing(self.path):
            self._append(json.dumps(finite(asdict(record))) + "\n")
            if record.run not in self._writers:
                self._writers[record.run] = self._make_writer(str(self._folder / record.run))
            writer = self._writers[record.run]
            # One event a round: one a number would take longer than the rounds of small sites.
            values = [self._Value(tag=n, simple_value=v) for n, v in _scalars(record)]
            writer.file_writer.add_summary(self._Summary(value=values), record.round)
            writer.flush()

    def close(self) -> None:
        """Close the event files."""
        with self._lock, storing(self._folder):
            for writer in self._writers.values():
                writer.close()

    def _append(self, line: str) -> None:
        before = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            os.truncate(self.path, before)
            raise


def _scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    values = {f"validation/{n}": v for n, v in record.metrics.items()} | {"loss/train": record.loss}
    for site in record.sites:
        own = {**site["metrics"], "epsilon": site["epsilon"]}
        values |= {f"{site['name']}/{n}": v for n, v in own.items()}
    yield from ((name, value) for name, value in values.items() if value is not None)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """What the disk refuses in here becomes a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: could not be written ({error.strerror}). Free some space or name another "
            "folder with --out, then run the same command again"
        ) from None


def write_results(
    runs: Sequence[SimulatedRun],
    outcomes: Mapping[str, Outcome],
    *,
    seed: int,
    seconds: float,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Write models, study.toml's digest and result.json into the main run's folder; returns it."""
    main = runs[0]
    outcomes = {
        run.name: replace(
            outcomes[run.name],
            final=_with_own_numbers(run, outcomes[run.name].final),
            external=_with_own_numbers(run, outcomes[run.name].external),
        )
        for run in runs
    }
    outcome, study = outcomes[main.name], main.study
    summaries = {run.name: summary(run, outcomes, main, seed) for run in runs}
    for run in runs:
        if strategy_for(run.study).local.keeps == "everything":
            summaries[run.name]["elsewhere"] = elsewhere(run, outcomes[run.name])
    for run in runs:
        local = strategy_for(run.study).local
        if local.keeps == "everything" and run is not main:
            continue  # nobody trained what is common to these hospitals: the untrained start
        about = {"study": study.name, "digest": run.study.digest, "run": run.name}
        if part := published_part(local):
            about["holds"] = part
        tensors.save(outcomes[run.name].weights, run.folder / "model.safetensors", about)
    tensors.save(outcome.last, main.folder / "model_last.safetensors")
    result = {
        "study": study.name,
        "title": study.title,
        "purpose": study.purpose,
        "digest": study.digest,
        "task": asdict(study.task),
        "strategy": study.federation.strategy,
        "seed": seed,
        "rounds": study.federation.rounds,
        "seconds": round(seconds, 2),
        "date": date.today().isoformat(),
        "selected_round": outcome.selected_round,
        **summaries[main.name],
        "baselines": {run.name: summaries[run.name] for run in runs[1:]},
        "refused": outcome.refused,
        "unlike": {site: list(fields) for site, fields in outcome.unlike.items()},
        "environment": dict(environment),
        "digests": {"study": study.digest, "model": tensors.digest(outcome.weights)},
        "cohorts": {r.site: r.cohort for r in outcome.final},
        "n_parameters": int(sum(a.size for a in tensors.floats(outcome.weights).values())),
        "bytes_per_round": sum(bytes_per_round(outcome.records)),
    }
    text = json.dumps(finite(result), indent=2, allow_nan=False)
    tensors.write_atomic(main.folder / "result.json", text.encode())
    return result


def _with_own_numbers(run: SimulatedRun, replies: Sequence[Reply]) -> tuple[Reply, ...]:
    """With what private sites keep from the coordinator: who simulates owns their data."""
    final = []
    for reply in replies:
        file = run.folder / "sites" / reply.site / "cohort.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        final.append(replace(reply, **kept))
    return tuple(final)


def summary(
    run: SimulatedRun, outcomes: Mapping[str, Outcome], main: SimulatedRun, seed: int
) -> dict[str, Any]:
    """sites, mean, all, all_intervals and an early end of one run, by the main one's hospitals.

    `mean` is over the sites' metrics, `all` counts every test case of every site once.
    """
    study = run.study
    names = tuple(study.evaluation.metrics or default_metrics(study.task))
    tables = site_scores(run, outcomes[run.name], main)
    replies = {r.site: r for r in outcomes[main.name].final} if run.pooled else {}
    replies |= {r.site: r for r in outcomes[run.name].final}
    sites = [
        _site(study, replies[site], scores, names, derive(seed, "bootstrap", site))
        for site, scores in sorted(tables.items())
    ]
    tested = [scores for _, scores in sorted(tables.items()) if scores is not None]
    everything = concatenate(tested) if tested else None
    values, bounds = _measured(study, everything, names, derive(seed, "bootstrap"))
    return {
        "sites": [{**s, "epsilon": None, "delta": None} if run.pooled else s for s in sites],
        "external": [
            _site(
                study, reply, _scores(run, reply.site), names, derive(seed, "outside", reply.site)
            )
            for reply in outcomes[run.name].external
        ],
        "mean": mean_over_sites([s["metrics"] for s in sites]),
        "all": values,
        "all_intervals": bounds,
        **ended_early(outcomes[run.name].ending, study.federation),
    }


def _site(
    study: Study, reply: Reply, scores: Scores | None, names: tuple[str, ...], seed: int
) -> dict[str, Any]:
    values, bounds = _measured(study, scores, names, seed)
    return {
        "name": reply.site,
        "n_train": reply.counts.get("train"),
        "n_validation": reply.counts.get("validation"),
        "n_test": 0 if scores is None else len(scores),
        "smallest_class": smallest_class(study.task, scores),
        "metrics": values,
        "intervals": bounds,
        "epsilon": reply.epsilon,
        "delta": reply.target_delta,
        "quarantined": dict(reply.left_out),
    }


def smallest_class(task: Task, scores: Scores | None) -> int | None:
    """Test cases of the rarest class that is there, or of a label's rarer side; None of masks."""
    if scores is None or task.kind == "segmentation" or not len(scores):
        return None
    truth = outcomes_of(task, scores).truth
    sides = [*truth.sum(axis=0), *(~truth).sum(axis=0)]
    return min((int(n) for n in sides if n), default=None)


def _measured(
    study: Study, scores: Scores | None, names: tuple[str, ...], seed: int
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Metrics and their intervals; a site without test cases has none."""
    if scores is None:
        return dict.fromkeys(names), {}
    values = summarise(study.task, scores, names)
    resamples = study.evaluation.bootstrap
    if not resamples:
        return values, {}
    around = intervals(study.task, scores, names, resamples=resamples, seed=seed, values=values)
    return values, dict(around)


def site_scores(
    run: SimulatedRun, outcome: Outcome, main: SimulatedRun
) -> dict[str, Scores | None]:
    """Test scores by hospital, None where it has no test case.

    A pooled run's cases go back to the hospitals that they came from.
    """
    found = {reply.site: _scores(run, reply.site) for reply in outcome.final}
    if not run.pooled:
        return found
    pooled = found["pooled"]
    position = {} if pooled is None else {key: i for i, key in enumerate(pooled.keys)}
    parts: dict[str, Scores | None] = {}
    for hospital in (h.name for h in run.hospitals):
        own = _scores(main, hospital)
        if own is None or pooled is None:
            continue
        rows = [position[key] for key in own.keys]
        parts[hospital] = Scores(
            keys=own.keys,
            patients=tuple(pooled.patients[i] for i in rows),
            columns={n: column[rows] for n, column in pooled.columns.items()},
        )
    return parts


def _scores(run: SimulatedRun, site: str) -> Scores | None:
    file = _scores_file(run, site)
    return load(file) if file.exists() else None


def _scores_file(run: SimulatedRun, site: str) -> Path:
    return run.folder / "sites" / site / "scores.npz"


def environment(device: str, workers: int) -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = {name: version(name) for name in ("torch", "monai", "flwr", "opacus", "numpy")}
    return {
        "medfl": version("medfl"),
        **packages,
        "python": platform.python_version(),
        "device": device,
        "cpus": os.cpu_count(),
        "workers": workers,
    }
