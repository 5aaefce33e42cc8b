"""What a received model does on a hospital's cases; single cases stay in the hospital's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfl.client.examples import Gallery
from medfl.client.released import Summary
from medfl.client.training.caseset import CaseSet
from medfl.common.messages import Metrics, Part
from medfl.common.metrics import default_metrics, needs_distances, summarise
from medfl.common.metrics.scores import Scores, score_classification, score_masks
from medfl.common.study import Study

if TYPE_CHECKING:
    from torch import nn


def evaluate(
    model: nn.Module,
    cases: CaseSet,
    study: Study,
    device: str,
    keep: Path | None = None,
    summary: Summary = summarise,
    durable: bool = True,
) -> Metrics:
    """Metrics of one part, None where undefined.

    summary: what is made of the scores; a private hospital says less, or says it with noise.
    keep: folder for scores.npz and examples.npz, for the final evaluation. Metrics that need
        surfaces are worth their time only then.
    durable: whether what is kept has to outlast a power cut.
    """
    names: Sequence[str] = study.evaluation.metrics or default_metrics(study.task)
    if keep is None:
        names = [n for n in names if not needs_distances([n])]
    if not len(cases):
        none = Scores((), (), {})
        return dict.fromkeys(names) if summary is summarise else summary(study.task, none, names)
    gallery = Gallery(study) if keep is not None and study.image is not None else None
    scores = score(model, cases, study, device, distances=needs_distances(names), gallery=gallery)
    if keep is not None:
        scores.save(keep / "scores.npz", durable=durable)
    if gallery is not None and keep is not None:
        gallery.save(keep / "examples.npz", durable=durable)
    return summary(study.task, scores, names)


def score(
    model: nn.Module,
    cases: CaseSet,
    study: Study,
    device: str,
    *,
    distances: bool,
    gallery: Gallery | None = None,
) -> Scores:
    """What the model does on these cases, case by case."""
    from medfl.client.training.predict import predict

    batches = predict(model, cases, study, device)
    if study.task.kind == "segmentation":
        predictions = (np.asarray(mask) for batch in batches for mask in batch)
        masks = (np.asarray(cases.targets[i], dtype=np.uint8) for i in range(len(cases)))
        shown = gallery.watch(cases, predictions) if gallery is not None else predictions
        spacing = study.image.spacing_mm if study.image is not None else None
        spacings = None if spacing is None else [tuple(spacing)] * len(cases)
        return score_masks(
            cases.keys, cases.patients, masks, shown, study.task.classes, spacings, distances
        )
    probability = np.concatenate([np.asarray(batch) for batch in batches])
    if gallery is not None:
        gallery.choose(cases, probability)
    return score_classification(cases.keys, cases.patients, np.asarray(cases.targets), probability)


def rounded(metrics: Mapping[Part, Metrics], decimals: int) -> dict[Part, Metrics]:
    """The same with fewer decimals, as the hospital's policy lets them leave."""
    return {
        part: {n: None if v is None else round(v, decimals) for n, v in values.items()}
        for part, values in metrics.items()
    }
