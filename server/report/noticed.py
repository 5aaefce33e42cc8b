"""What a reader must know before any figure: who is absent, and who is unlike the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from medfl.server.report import words
from medfl.server.report.run import Run, SiteResult
from medfl.strategies.catalogue import STRATEGIES
from medfl.strategies.home import published_part

# An AUROC without an interval is far below chance from here on; noise of a small hospital is not.
FAR_BELOW = 0.3
_CHANCE = 0.5
_RANKS = ("auroc", "balanced_accuracy")


def noticed(run: Run) -> list[str]:
    """One sentence each; empty where there is nothing to be noticed."""
    return [
        *_stopped(run),
        *_ended(run),
        *absent(run),
        *_unlike(run),
        *_turned_round(run),
        *_shared_part(run),
    ]


def _stopped(run: Run) -> list[str]:
    done = run.facts.get("stopped_after")
    if done is None:
        return []
    return [
        f"the run was stopped after round {done} of {run.facts.get('rounds')} and can go on: "
        "nobody was asked for test cases, which are read once, at a run's end"
    ]


def _ended(run: Run) -> list[str]:
    ways = {"": run.facts, **(run.facts.get("baselines") or {})}
    told = {name: plain["ending"] for name, plain in ways.items() if plain.get("ending")}
    return [f"{words.way(name)}: {text}" if name else str(text) for name, text in told.items()]


def absent(run: Run) -> list[str]:
    """Hospitals that refused, or whose answers were missing in some rounds, and why."""
    refused: Mapping[str, str] = run.facts.get("refused") or {}
    rounds = [r for r in run.rounds if r.run == "main"]
    lines = []
    for site, why in refused.items():
        there = sum(site in r.site_metrics for r in rounds)
        if not there and site not in words.by_name(run.federated.sites):
            lines.append(f"{site} took no part: {why}")
        elif there < len(rounds):
            lines.append(f"{site} took part in {there} of {_plural(len(rounds), 'round')}: {why}")
    found: dict[tuple[str, str], int] = {}
    for line in rounds:
        for site, why in line.left_out.items():
            found[site, why] = found.get((site, why), 0) + 1
    for (site, why), n in sorted(found.items()):
        lines.append(f"{site} was left out of {_plural(n, 'round')}: {why}")
    tested = words.by_name(run.federated.sites)
    if run.facts.get("stopped_after") is not None:
        return lines
    for site in sorted({name for r in rounds for name in r.site_metrics} - tested.keys()):
        lines.append(f"{site} trained and did not answer at the end: its test cases are missing")
    return lines


def untrained(run: Run) -> list[SiteResult]:
    """Hospitals in the test that sent no update in any round: the model is new to them."""
    rounds = [r for r in run.rounds if r.run == "main" and r.trained and not r.void]
    trained = {name for r in rounds for name in r.site_metrics}
    return [s for s in run.federated.sites if s.n_train == 0 or (trained and s.name not in trained)]


def _unlike(run: Run) -> Iterable[str]:
    found: Mapping[str, Any] = run.facts.get("unlike") or {}
    for site, fields in sorted(found.items()):
        yield f"{site} is unlike the other hospitals in {'; '.join(map(str, fields))}"


def _turned_round(run: Run) -> Iterable[str]:
    """Hospitals whose cases the model ranks backwards, as one does whose labels are exchanged."""
    for site in run.federated.sites:
        metric = next((m for m in _RANKS if site.metrics.get(m) is not None), None)
        if (
            metric is None
            or not words.shows_metrics(site, metric)
            or run.study.task.kind == "segmentation"
        ):
            continue
        number, pair = site.metrics[metric], site.intervals.get(metric)
        far = pair[1] < _CHANCE if pair is not None else (number or 0.0) < FAR_BELOW
        if metric != "auroc" and len(run.study.task.classes) > 2:
            continue  # chance is not one half there
        if not far and _others_rank_backwards(run, site.name, metric):
            yield (
                f"{site.name} may code its classes the other way round: every other hospital's own "
                f"model ranks its cases far below chance. Compare its labels with the study's "
                "before anything is concluded"
            )
        if far:
            local = words.by_name(run.baselines["local"].sites) if "local" in run.baselines else {}
            alone = local[site.name].metrics.get(metric) if site.name in local else None
            own = f"; its own model reaches {words.value(metric, alone)}" if alone else ""
            yield (
                f"{site.name} may code its classes the other way round: the model's "
                f"{words.measure(metric).label} there is {words.value(metric, number)}, far below "
                f"chance{own}. Compare its labels with the study's before anything is concluded"
            )


def _others_rank_backwards(run: Run, where: str, metric: str) -> bool:
    """Of two hospitals it cannot be said which one is turned round; of three or more it can."""
    if "local" not in run.baselines:
        return False
    tried = run.baselines["local"].elsewhere
    found = [tested.get(where, {}).get(metric) for whose, tested in tried.items() if whose != where]
    return len(found) > 1 and all(v is not None and v < FAR_BELOW for v in found)


def _shared_part(run: Run) -> Iterable[str]:
    made = STRATEGIES.get(run.study.federation.strategy)
    if made is not None and (part := published_part(made().local)):
        yield (
            f"The published file holds {part}. The figures are those of each hospital's whole "
            "model, which it keeps; a new hospital gets the file and has to train what is missing "
            "on its own cases first, and how it would do then was not measured"
        )


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
