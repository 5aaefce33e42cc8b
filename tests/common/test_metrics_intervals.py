from __future__ import annotations

import numpy as np
import pytest

from medfl.common.metrics import Scores, default_metrics, intervals, score_classification, summarise
from medfl.common.study import Task

BINARY = Task(kind="classification", classes=["benign", "malignant"])


def drawn(n: int, seed: int, patients: int | None = None) -> Scores:
    """Cases of which four in five are told right, in random order."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 2, n)
    right = generator.random(n) < 0.8
    sure = generator.uniform(0.5, 1, n)
    said = np.where(right == (target == 1), sure, 1 - sure)
    keys = [str(i) for i in range(n)]
    owners = keys if patients is None else [str(i % patients) for i in range(n)]
    return score_classification(keys, owners, target, said)


def test_a_patient_with_fifty_images_is_one_draw() -> None:
    # Both images' owners are drawn twice with probability 1/4: accuracy 0 and 1 are both common.
    right, wrong = [0.1] * 50, [0.9]
    cases = score_classification(
        [str(i) for i in range(51)],
        ["many"] * 50 + ["one"],
        np.zeros(51, np.int64),
        np.array(right + wrong),
    )
    told = intervals(BINARY, cases, ["accuracy"], resamples=200, seed=1)
    assert told["accuracy"] == (0.0, 1.0)


def test_intervals_repeat_with_the_seed_and_move_with_it() -> None:
    cases, names = drawn(80, 3), default_metrics(BINARY)
    first = intervals(BINARY, cases, names, resamples=100, seed=7)
    assert first == intervals(BINARY, cases, names, resamples=100, seed=7)
    assert first != intervals(BINARY, cases, names, resamples=100, seed=8)


def test_the_interval_of_one_metric_does_not_depend_on_the_others() -> None:
    cases = drawn(80, 3)
    alone = intervals(BINARY, cases, ["auroc"], resamples=100, seed=7)
    with_others = intervals(BINARY, cases, default_metrics(BINARY), resamples=100, seed=7)
    assert alone["auroc"] == with_others["auroc"]


def test_intervals_hold_the_metric_and_widen_with_the_level() -> None:
    cases = drawn(200, 5)
    names = [name for name in default_metrics(BINARY) if name != "ece"]  # ece is biased upwards
    points = summarise(BINARY, cases, names)
    narrow = intervals(BINARY, cases, names, resamples=300, seed=1, level=0.5)
    wide = intervals(BINARY, cases, names, resamples=300, seed=1, level=0.95)
    for name in names:
        inner, outer, point = narrow[name], wide[name], points[name]
        assert inner is not None
        assert outer is not None
        assert point is not None
        assert outer[0] < inner[0] < point < inner[1] < outer[1]


def test_about_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(200):
        told = intervals(BINARY, drawn(100, seed), ["accuracy"], resamples=200, seed=seed)
        low, high = told["accuracy"] or (1.0, 0.0)
        held += low <= 0.8 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_more_images_of_the_same_patients_do_not_narrow_the_interval() -> None:
    few = drawn(10, 1)
    repeated = score_classification(
        [str(i) for i in range(100)],
        list(few.patients) * 10,
        np.tile(few.columns["target"], 10),
        np.tile(few.columns["probability"], (10, 1)),
    )
    once = intervals(BINARY, few, ["brier"], resamples=100, seed=2)["brier"]
    tenfold = intervals(BINARY, repeated, ["brier"], resamples=100, seed=2)["brier"]
    assert tenfold == pytest.approx(once)


def test_one_patient_one_class_or_no_resamples_give_no_interval() -> None:
    cases = drawn(30, 1, patients=1)
    assert intervals(BINARY, cases, ["accuracy"], resamples=50, seed=1) == {"accuracy": None}
    keys = ["a", "b", "c"]
    healthy = score_classification(keys, keys, np.zeros(3, np.int64), np.array([0.1, 0.2, 0.3]))
    told = intervals(BINARY, healthy, ["auroc", "accuracy"], resamples=50, seed=1)
    assert told == {"auroc": None, "accuracy": (1.0, 1.0)}
    assert intervals(BINARY, drawn(9, 1), ["auroc"], resamples=0, seed=1) == {"auroc": None}


def test_a_metric_undefined_in_most_resamples_gives_no_interval() -> None:
    # One ill patient of two: half of the resamples hold one class only.
    keys = ["a", "b"]
    two = score_classification(keys, keys, np.array([0, 1]), np.array([0.1, 0.9]))
    told = intervals(BINARY, two, ["auroc"], resamples=2000, seed=5)
    undefined = np.random.default_rng(5).multinomial(2, [0.5, 0.5], 2000).max(axis=1) == 2
    assert (told["auroc"] is None) == (undefined.mean() >= 0.5)
    assert intervals(BINARY, two, ["accuracy"], resamples=50, seed=5)["accuracy"] == (1.0, 1.0)


def test_a_large_site_is_resampled_in_blocks_without_changing_the_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = drawn(50, 2, patients=20)
    whole = intervals(BINARY, cases, ["auroc"], resamples=64, seed=4)
    monkeypatch.setattr("medfl.common.metrics._CELLS", 7 * 50)
    assert intervals(BINARY, cases, ["auroc"], resamples=64, seed=4) == whole
