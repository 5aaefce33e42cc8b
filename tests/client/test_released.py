"""Metrics from noisy sums: right without noise, bounded per patient, silent about the rest."""

from __future__ import annotations

import numpy as np
import pytest

from medfl.client.released import contributions, with_noise, withheld
from medfl.common.metrics import summarise
from medfl.common.metrics.scores import Scores, score_classification
from medfl.common.study import Task

RISK = Task(kind="risk", classes=["well", "ill"])
THREE = Task(kind="classification", classes=["a", "b", "c"])
ORGANS = Task(kind="segmentation", classes=["background", "liver", "spleen"])
KEY = bytes(32)


def scores_of(task: Task, patients: str, seed: int = 0) -> Scores:
    rng, n = np.random.default_rng(seed), len(patients)
    keys = [str(i) for i in range(n)]
    if task.kind == "segmentation":
        columns = {f"dice/{c}": rng.random(n) for c in task.classes[1:]}
        columns["dice/spleen"][::3] = np.nan
        return Scores(tuple(keys), tuple(patients), columns)
    k = len(task.classes)
    probability = rng.dirichlet(np.ones(k), n)
    target = rng.integers(0, k, n)
    return score_classification(
        keys, list(patients), target, probability[:, -1] if k == 2 else probability
    )


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (RISK, ["accuracy", "balanced_accuracy", "recall", "specificity"]),
        (THREE, ["accuracy", "balanced_accuracy"]),
        (ORGANS, ["dice", "dice_liver", "dice_spleen"]),
    ],
)
def test_without_noise_they_are_the_exact_metrics(task: Task, names: list[str]) -> None:
    scores = scores_of(task, "abcdefghijklmnopqrst")
    exact = summarise(task, scores, names)
    assert with_noise(0.0, KEY)(task, scores, names) == pytest.approx(exact)


@pytest.mark.parametrize("task", [RISK, THREE, ORGANS])
def test_no_patient_moves_the_sums_by_more_than_the_bound(task: Task) -> None:
    scores = scores_of(task, "a" + "b" * 50 + "cccdde")
    values, defined, bound = contributions(task, scores)
    assert values.shape == defined.shape
    assert len(values) == 5
    norms = np.sqrt(np.square(values).sum(axis=1) + np.square(defined).sum(axis=1))
    assert (norms <= bound + 1e-12).all()


def test_the_worst_patient_reaches_the_bound() -> None:
    perfect = score_classification(["1"], ["a"], np.array([1]), np.array([1.0]))
    values, defined, bound = contributions(RISK, perfect)
    assert np.sqrt((values**2).sum() + (defined**2).sum()) == pytest.approx(bound)


def test_noise_has_the_spread_of_the_bound_and_other_keys_give_other_noise() -> None:
    scores = scores_of(RISK, "abcdefghij" * 30)
    told = [
        with_noise(0.5, bytes([i]) * 32)(RISK, scores, ["accuracy"])["accuracy"] for i in range(200)
    ]
    # 10 patients, sums of 2 x 2 numbers: accuracy is (v0 + v1) / (d0 + d1).
    exact = summarise(RISK, scores, ["accuracy"])["accuracy"]
    assert np.median([t for t in told if t is not None]) == pytest.approx(exact, abs=0.05)
    assert 0.05 < np.std([t for t in told if t is not None]) < 0.4


def test_ranks_are_never_told_and_neither_is_what_few_patients_are_left_for() -> None:
    scores = scores_of(RISK, "abcdefgh")
    told = with_noise(0.1, KEY)(RISK, scores, ["accuracy", "auroc"])
    assert told["auroc"] is None
    assert 0 <= (told["accuracy"] or 0) <= 1
    alone = score_classification(["1"], ["a"], np.array([1]), np.array([1.0]))
    assert with_noise(0.0, KEY)(RISK, alone, ["specificity"]) == {"specificity": None}
    assert withheld(RISK, scores, ["accuracy"]) == {}
