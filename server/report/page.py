"""Everything that the templates print, as plain rows of text and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from medfl.common.metrics import scores as score_files
from medfl.common.metrics.scores import Scores
from medfl.server.report import (
    classification,
    curves,
    noticed,
    segmentation,
    summary,
    tables,
    updates,
    verdict,
    words,
)
from medfl.server.report.plot import MANY
from medfl.server.report.run import Run, arrays_path


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn figure with its caption. wide: takes the whole column."""

    drawing: Markup
    caption: str
    wide: bool = True


def figures(run: Run, group: str) -> list[Figure]:
    """One of `GROUPS`."""
    return GROUPS[group](run)


def context(run: Run, drawn: Mapping[str, list[Figure]] | None = None) -> dict[str, Any]:
    """What report.html.j2 and model_card.md.j2 need; pure, but for reading the run's arrays.

    drawn: groups of `figures` that are there already.
    """
    metric = words.headline_metric(run)
    groups = {group: (drawn or {}).get(group) for group in GROUPS}
    return {
        "name": run.study.name,
        "title": run.facts.get("title") or run.study.title or run.study.name,
        "purpose": run.study.purpose,
        "date": str(run.facts.get("date", "")),
        "verdict": verdict.verdict(run, metric),
        "summary": summary.summary(run, metric),
        "noticed": [*noticed.noticed(run), *updates.against_the_rest(run)],
        "cards": tables.cards(run, metric),
        "comparison": tables.comparison(run),
        "means": tables.mean_table(run),
        "sites": tables.site_tables(run, metric),
        "external": tables.external_table(run, metric),
        "hides": not all(
            words.shows_metrics(s, name)
            for s in (*run.federated.sites, *run.external)
            for name in s.metrics
        ),
        **{g: figures(run, g) if found is None else found for g, found in groups.items()},
        "sides": _orientation(run) is not None,
        "shows_masks": run.study.task.kind == "segmentation",
        "updates": updates.updates_table(run),
        "privacy_words": summary.privacy_words(run),
        "site_privacy_words": summary.site_privacy_words(run),
        "privacy": tables.privacy_table(run) if run.private_sites else None,
        "privacy_figure": curves.epsilon_over_rounds(run) if run.private_sites else None,
        "data": tables.data_table(run),
        "made": tables.made(run),
        "waiting": tables.waiting_table(run),
        "digests": tables.digest_table(run),
        "limits": summary.limits(run),
        "small": words.SMALL,
    }


def _site_figures(run: Run) -> list[Figure]:
    metric = words.headline_metric(run)
    if metric is None or not curves.ranked(run.federated, metric):
        return []
    label = words.measure(metric).label
    if len(run.federated.sites) <= MANY:
        lines = "" if run.between_hospitals else "; lines are 95 % intervals"
        text = f"{label} on each hospital's test cases{lines}."
        return [Figure(curves.forest(run, metric), text)]
    lines = "" if run.between_hospitals else "; lines are 95 % intervals"
    shown = "The ten best and the ten worst hospitals"
    if len(curves.ranked(run.federated, metric)) <= MANY:
        shown = f"The hospitals with at least {words.SMALL} test cases"
    return [
        Figure(curves.spread(run, metric), f"How {label} spreads over the hospitals."),
        Figure(curves.forest(run, metric), f"{shown}{lines}."),
    ]


def _round_figures(run: Run) -> list[Figure]:
    metric = _validation_metric(run)
    drawing = curves.over_rounds(run, metric)
    if drawing is None:
        return []
    text = (
        "Thick: mean over hospitals. Pale: each hospital, or the band that holds 80 % of them. "
        "0 is the untrained start; the dotted line marks the published model."
    )
    return [Figure(drawing, text)]


def _validation_metric(run: Run) -> str | None:
    known = list(dict.fromkeys(m for r in run.rounds for m in r.metrics))
    headline = words.headline_metric(run)
    return headline if headline in known else next(iter(known), None)


def load_scores(run: Run, way: str | None = None) -> dict[str, Scores]:
    """The test scores of every hospital that has them, by hospital.

    Pooled training has no hospitals; its scores are those of the one site `pooled`.
    """
    names = [s.name for s in run.federated.sites]
    paths = {n: arrays_path(run, way, n, "scores.npz") for n in [*names, *([way] if way else [])]}
    return {n: score_files.load(path) for n, path in paths.items() if path is not None}


def _task_figures(run: Run) -> list[Figure]:
    task, ours = run.study.task, load_scores(run)
    if not ours:
        return []
    if task.kind == "segmentation":
        text = (
            "Boxes hold the middle half of the test cases, whiskers 90 %; the line is the median."
        )
        if len(ours) > MANY or all(len(s) < words.SMALL for s in ours.values()):
            text = "Dice over the test cases of all hospitals."
        return _present([(segmentation.dice_figure(task, ours), text, True)])
    everything = {"Federated model": _answered(list(ours.values()))}
    for name in run.baselines:
        if name != "local" and (theirs := load_scores(run, name)):
            everything[words.way(name)] = _answered(list(theirs.values()))
    joined = everything["Federated model"]
    if not len(joined):
        return []
    return _present([
        (classification.roc_figure(task, everything), "ROC over all test cases. Dotted: chance.",
         False),
        (classification.reliability_figure(task, joined), "Are stated chances honest? On the "
         "dotted line they are. Below: how many cases.", False),
        (classification.confusion_figure(task, joined), "Truth by rows, what the federated model "
         "said by columns, all test cases; shares are of the row.", classification.wide(task)),
        (classification.separation_figure(task, joined), "How far the model tells the two apart: "
         "the chance it stated, by the truth.", False),
    ])  # fmt: skip


def _answered(parts: Sequence[Scores]) -> Scores:
    """The cases of all hospitals for which the model gave finite chances; others have no place."""
    joined = score_files.concatenate(parts)
    kept = np.flatnonzero(np.isfinite(joined.columns["probability"]).all(axis=1))
    return Scores(
        keys=tuple(joined.keys[i] for i in kept),
        patients=tuple(joined.patients[i] for i in kept),
        columns={name: column[kept] for name, column in joined.columns.items()},
    )


def _present(parts: Iterable[tuple[Markup | None, str, bool]]) -> list[Figure]:
    return [Figure(drawing, text, wide) for drawing, text, wide in parts if drawing is not None]


def _pictures(run: Run) -> list[Figure]:
    task = run.study.task
    examples = [
        e for site in run.federated.sites
        if (path := arrays_path(run, None, site.name, "examples.npz")) is not None
        for e in segmentation.read_examples(path, site.name, _orientation(run))
    ]  # fmt: skip
    best, worst = segmentation.best_and_worst(examples)
    return _present([
        (segmentation.pictures("best", task, best), "Among the best", True),
        (segmentation.pictures("worst", task, worst), "Among the worst", True),
    ])  # fmt: skip


def _orientation(run: Run) -> str | None:
    """Of a volume's axes; None for pictures, whose rows and columns are already upright."""
    image = run.study.image
    return image.orientation if image is not None and image.dimensions == 3 else None


GROUPS: Mapping[str, Callable[[Run], list[Figure]]] = {
    "site_figures": _site_figures,
    "round_figures": _round_figures,
    "task_figures": _task_figures,
    "pictures": _pictures,
}
