"""What a private hospital says of its metrics: nothing, or sums over patients with noise.

A metric of a few patients gives them away as well as a gradient does. Where the study states a
price (`privacy.metrics_epsilon`), the hospital releases sums to which each patient adds a vector
of bounded length, with Gaussian noise; metrics are quotients of such sums, which cost no more.
Rank metrics (AUROC) and distances are no such quotients and are never released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.messages import Metrics
from medfl.common.metrics.outcomes import outcomes
from medfl.common.metrics.scores import DICE, Scores
from medfl.common.noise import Keystream
from medfl.common.study import Task

Summary = Callable[[Task, Scores, Iterable[str]], Metrics]
Array = NDArray[np.float64]


def withheld(task: Task, scores: Scores, names: Iterable[str]) -> Metrics:
    """No metric at all."""
    return {}


def with_noise(noise_multiplier: float, key: bytes) -> Summary:
    """Metrics from noisy sums; None where too little is left, or for what no sum can give."""

    def summary(task: Task, scores: Scores, names: Iterable[str]) -> Metrics:
        return _noised(task, contributions(task, scores), noise_multiplier, key, names)

    return summary


def of_nobody(task: Task, noise_multiplier: float, key: bytes, names: Iterable[str]) -> Metrics:
    """As `with_noise` of a part that has no patient, which the answer must not tell."""
    k = len(task.classes) - (task.kind == "segmentation")
    bound = (2.0 * k if task.kind == "segmentation" else 2.0) ** 0.5
    nothing = np.zeros((0, k)), np.zeros((0, k)), bound
    return _noised(task, nothing, noise_multiplier, key, names)


def _noised(
    task: Task,
    contributed: tuple[Array, Array, float],
    noise_multiplier: float,
    key: bytes,
    names: Iterable[str],
) -> Metrics:
    values, defined, bound = contributed
    sums = np.stack([values.sum(axis=0), defined.sum(axis=0)])
    noise = Keystream(key, "metrics").normals(sums.size).reshape(sums.shape)
    found = _metrics(task, *(sums + noise_multiplier * bound * noise))
    return {name: found.get(name) for name in names}


def contributions(task: Task, scores: Scores) -> tuple[Array, Array, float]:
    """(values (P, K), defined (P, K), bound): the L2 norm of a patient's two rows is <= bound.

    Segmentation: K foreground classes; the patient's mean Dice, and the share of their cases where
    it is defined. Else K classes; shares of the patient's cases that are of the class, and of
    those that are recognised as well: the shares add up to 1 over the classes, so the bound is the
    square root of 2 for any number of classes.
    """
    patients, owner = np.unique(np.array(scores.patients), return_inverse=True)
    of_patient = np.zeros((len(patients), len(scores)))
    of_patient[owner, np.arange(len(scores))] = 1.0
    of_patient /= np.maximum(of_patient.sum(axis=1, keepdims=True), 1.0)
    if task.kind == "segmentation":
        each = np.stack([_dice(scores.columns[f"{DICE}/{n}"]) for n in task.classes[1:]], axis=1)
        there = np.isfinite(each)
        value = np.where(there, np.clip(each, 0, 1), 0.0)
        return of_patient @ value, of_patient @ there, float((2 * each.shape[1]) ** 0.5)
    right, truth = _right_and_truth(task, scores)
    return of_patient @ (right & truth), of_patient @ truth, 2**0.5


def _dice(column: NDArray[Any]) -> Array:
    return np.asarray(column, dtype=np.float64)


def _right_and_truth(task: Task, scores: Scores) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N, 1) whether the case is classified rightly, (N, C) its class."""
    found = outcomes(task, scores)
    if found.one_of_many:
        return (found.truth == found.predicted).all(axis=1, keepdims=True), found.truth
    truth = np.concatenate([~found.truth, found.truth], axis=1)
    return found.truth == found.predicted, truth


def _metrics(task: Task, values: Array, defined: Array) -> Mapping[str, float | None]:
    """(K,) noisy sums and counts -> metrics by name."""
    each = [_share(v, n) for v, n in zip(values, defined, strict=True)]
    known = [v for v in each if v is not None]
    mean = sum(known) / len(known) if known else None
    if task.kind == "segmentation":
        named = zip(task.classes[1:], each, strict=True)
        return {DICE: mean, **{f"{DICE}_{name}": v for name, v in named}}
    whole = mean if len(known) == len(each) else None
    found = {"accuracy": _share(values.sum(), defined.sum()), "balanced_accuracy": whole}
    if len(each) == 2:
        return {**found, "specificity": each[0], "recall": each[1]}
    return found


def _share(value: float, n: float) -> float | None:
    return float(np.clip(value / n, 0.0, 1.0)) if n >= 1 else None
