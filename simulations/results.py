"""What a finished simulation leaves on disk."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medfl.common import tensors
from medfl.common.messages import Reply
from medfl.common.metrics import default_metrics, intervals, mean_over_sites, summarise
from medfl.common.metrics.scores import Scores, concatenate, load
from medfl.common.seeds import derive
from medfl.common.study import Study
from medfl.server.rounds import Outcome, RoundRecord
from medfl.simulations.sites import SimulatedRun


class RoundLog:
    """rounds.jsonl and TensorBoard events, written as rounds end; several runs may write."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rounds.jsonl"
        self.path.write_text("")
        self._folder = folder / "tensorboard"
        self._make_writer = SummaryWriter
        self._writers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def write(self, record: RoundRecord) -> None:
        """Append one round."""
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            if record.run not in self._writers:
                self._writers[record.run] = self._make_writer(str(self._folder / record.run))
            writer = self._writers[record.run]
            values = {f"validation/{n}": v for n, v in record.metrics.items()}
            for name, value in {**values, "loss/train": record.loss}.items():
                if value is not None:
                    writer.add_scalar(name, value, record.round)
            for site in record.sites:
                for name, value in [*site["metrics"].items(), ("epsilon", site["epsilon"])]:
                    if value is not None:
                        writer.add_scalar(f"{site['name']}/{name}", value, record.round)
            writer.flush()

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()


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
    outcome, study = outcomes[main.name], main.study
    tables = {run.name: site_scores(run, outcomes[run.name], runs[0]) for run in runs}
    summaries = {run.name: summary(run, outcomes[run.name], tables[run.name], seed) for run in runs}
    for run in runs:
        about = {"study": study.name, "digest": run.study.digest, "run": run.name}
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
        "environment": dict(environment),
        "digests": {"study": study.digest, "model": tensors.digest(outcome.weights)},
        "cohorts": {
            r.site: r.cohort or _kept_at(main, r.site).get("digest", "") for r in outcome.final
        },
        "n_parameters": int(sum(a.size for a in tensors.floats(outcome.weights).values())),
        "bytes_per_round": _bytes_per_round(outcome.records),
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    tensors.write_atomic(main.folder / "result.json", text.encode())
    return result


def summary(
    run: SimulatedRun, outcome: Outcome, tables: Mapping[str, Scores], seed: int
) -> dict[str, Any]:
    """sites, mean, all, all_intervals of one run."""
    study = run.study
    names = tuple(study.evaluation.metrics or default_metrics(study.task))
    replies = {r.site: r for r in outcome.final}
    sites = [
        _site(run, site, scores, replies, names, derive(seed, "bootstrap", site))
        for site, scores in sorted(tables.items())
    ]
    everything = concatenate([tables[s["name"]] for s in sites])
    return {
        "sites": sites,
        "mean": mean_over_sites([s["metrics"] for s in sites]),
        "all": summarise(study.task, everything, names),
        "all_intervals": _intervals(study, everything, names, derive(seed, "bootstrap")),
    }


def _site(
    run: SimulatedRun,
    site: str,
    scores: Scores,
    replies: Mapping[str, Reply],
    names: tuple[str, ...],
    seed: int,
) -> dict[str, Any]:
    study, reply, kept = run.study, replies.get(site), _kept_at(run, site)
    counts = kept.get("counts") or (reply.counts if reply is not None else {})
    return {
        "name": site,
        "n_train": counts.get("train"),
        "n_validation": counts.get("validation"),
        "n_test": len(scores),
        "metrics": summarise(study.task, scores, names),
        "intervals": _intervals(study, scores, names, seed),
        "epsilon": reply.epsilon if reply is not None else None,
        "delta": reply.target_delta if reply is not None else None,
        "quarantined": kept.get("left_out") or (dict(reply.left_out) if reply is not None else {}),
    }


def _kept_at(run: SimulatedRun, site: str) -> dict[str, Any]:
    """What a private site did not tell the coordinator; whoever simulates owns its data."""
    file = run.folder / "sites" / site / "cohort.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _intervals(study: Study, scores: Scores, names: tuple[str, ...], seed: int) -> dict[str, Any]:
    if not study.evaluation.bootstrap:
        return {}
    return dict(
        intervals(study.task, scores, names, resamples=study.evaluation.bootstrap, seed=seed)
    )


def site_scores(run: SimulatedRun, outcome: Outcome, main: SimulatedRun) -> dict[str, Scores]:
    """Test scores by hospital; a pooled run's cases go back to the hospitals they came from."""
    found = {
        reply.site: load(_scores_file(run, reply.site))
        for reply in outcome.final
        if _scores_file(run, reply.site).exists()
    }
    if not run.pooled:
        return found
    pooled = found["pooled"]
    position = {key: i for i, key in enumerate(pooled.keys)}
    parts = {}
    for hospital in main.names:
        file = _scores_file(main, hospital)
        if file.exists():
            rows = [position[key] for key in load(file).keys]
            parts[hospital] = Scores(
                keys=tuple(pooled.keys[i] for i in rows),
                patients=tuple(pooled.patients[i] for i in rows),
                columns={n: column[rows] for n, column in pooled.columns.items()},
            )
    return parts


def _scores_file(run: SimulatedRun, site: str) -> Path:
    return run.folder / "sites" / site / "scores.npz"


def _bytes_per_round(records: Sequence[RoundRecord]) -> int:
    trained = [r for r in records if r.bytes_up]
    return round(sum(r.bytes_down + r.bytes_up for r in trained) / max(1, len(trained)))


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
