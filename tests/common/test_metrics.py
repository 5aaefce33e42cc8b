from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.common.errors import ConfigError
from medfl.common.metrics import (
    METRICS,
    Scores,
    better,
    default_metrics,
    intervals,
    known_metrics,
    mean_over_sites,
    needs_distances,
    score_classification,
    summarise,
)
from medfl.common.metrics.resampled import Drawn
from medfl.common.study import Task

BINARY = Task(kind="classification", classes=["benign", "malignant"])
THREE = Task(kind="classification", classes=["a", "b", "c"])
LABELS = Task(kind="classification", classes=["effusion", "nodule"], multi_label=True)
ORGANS = Task(kind="segmentation", classes=["background", "liver", "spleen"])


def scored(target: object, probability: object, patients: list[str] | None = None) -> Scores:
    answer = np.array(probability, dtype=np.float64)
    keys = [f"case-{i}" for i in range(len(answer))]
    return score_classification(keys, patients or keys, np.array(target), answer)


def value(task: Task, scores: Scores, name: str) -> float | None:
    return summarise(task, scores, [name])[name]


# Two hits, one miss, one false alarm, four rightly left alone.
EIGHT = scored([1, 1, 1, 0, 0, 0, 0, 0], [0.9, 0.8, 0.3, 0.7, 0.2, 0.1, 0.4, 0.05])


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("accuracy", 6 / 8),
        ("recall", 2 / 3),
        ("specificity", 4 / 5),
        ("balanced_accuracy", (2 / 3 + 4 / 5) / 2),
        ("precision", 2 / 3),
        ("f1", 2 / 3),
        ("auroc", (5 + 5 + 3) / 15),
        ("average_precision", (1 + 1 + 3 / 5) / 3),
        ("brier", (0.01 + 0.04 + 0.49 + 0.49 + 0.04 + 0.01 + 0.16 + 0.0025) / 8),
    ],
)
def test_binary_metrics_equal_the_hand_computed_number(name: str, by_hand: float) -> None:
    assert value(BINARY, EIGHT, name) == pytest.approx(by_hand, abs=1e-12)


def test_two_columns_of_probability_say_the_same_as_the_positive_one_alone() -> None:
    positive = EIGHT.columns["probability"]
    both = scored(EIGHT.columns["target"], np.hstack([1 - positive, positive]))
    names = default_metrics(BINARY)
    assert summarise(BINARY, both, names) == summarise(BINARY, EIGHT, names)


def test_a_probability_of_one_half_is_a_no() -> None:
    assert value(BINARY, scored([0, 1], [0.5, 0.6]), "accuracy") == 1.0


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("accuracy", 4 / 6),
        ("recall", (2 / 3 + 1 / 2 + 1) / 3),
        ("balanced_accuracy", (2 / 3 + 1 / 2 + 1) / 3),
        ("specificity", (1 + 3 / 4 + 4 / 5) / 3),
        ("precision", (1 + 1 / 2 + 1 / 2) / 3),
        ("f1", (4 / 5 + 1 / 2 + 2 / 3) / 3),
        ("brier", 2 * 2 / 6),
    ],
)
def test_multi_class_metrics_are_means_over_one_class_against_the_rest(
    name: str, by_hand: float
) -> None:
    certain = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    cases = scored([0, 0, 0, 1, 1, 2], certain)
    assert value(THREE, cases, name) == pytest.approx(by_hand, abs=1e-12)


def test_multi_label_metrics_are_means_over_the_labels() -> None:
    # effusion: hit, false alarm, right, right; nodule: hit, hit, miss, right.
    target = np.array([[1, 1], [0, 1], [0, 1], [0, 0]], dtype=np.float32)
    cases = scored(target, [[0.9, 0.8], [0.7, 0.9], [0.1, 0.2], [0.2, 0.1]])
    assert value(LABELS, cases, "accuracy") == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert value(LABELS, cases, "recall") == pytest.approx((1 + 2 / 3) / 2)
    assert value(LABELS, cases, "specificity") == pytest.approx((2 / 3 + 1) / 2)
    assert value(LABELS, cases, "precision") == pytest.approx((1 / 2 + 1) / 2)
    assert value(LABELS, cases, "auroc") == pytest.approx(1.0)


def test_binary_calibration_error_compares_risk_with_frequency() -> None:
    # Ten told 0.1, two of them ill; ten told 0.9, six ill: gaps 0.1 and 0.3, half of the cases.
    target = [1] * 2 + [0] * 8 + [1] * 6 + [0] * 4
    cases = scored(target, [0.1] * 10 + [0.9] * 10)
    assert value(BINARY, cases, "ece") == pytest.approx((0.1 + 0.3) / 2)


def test_calibration_errors_in_one_bin_cancel_and_across_bins_do_not() -> None:
    same_bin = scored([1, 0], [0.41, 0.45])
    assert value(BINARY, same_bin, "ece") == pytest.approx(0.07)
    two_bins = scored([1, 0], [0.41, 0.55])
    assert value(BINARY, two_bins, "ece") == pytest.approx((0.59 + 0.55) / 2)


def test_calibration_bins_are_fifteen_and_closed_above() -> None:
    edge = scored([1, 0], [1 / 15, 1 / 15 - 1e-6])
    assert value(BINARY, edge, "ece") == pytest.approx((1 - 2 / 15) / 2, abs=1e-5)
    beyond = scored([1, 0], [1 / 15 + 1e-6, 1 / 15 - 1e-6])
    assert value(BINARY, beyond, "ece") == pytest.approx((14 / 15 + 1 / 15) / 2, abs=1e-5)


def test_multi_class_calibration_error_compares_confidence_with_accuracy() -> None:
    said = [[0.6, 0.3, 0.1]] * 5
    assert value(THREE, scored([0, 0, 0, 0, 2], said), "ece") == pytest.approx(4 / 5 - 0.6)


@pytest.mark.parametrize("ill", [0, 1])
def test_a_site_with_one_class_has_no_ranking_metrics(ill: int) -> None:
    told = summarise(BINARY, scored([ill] * 3, [0.2, 0.8, 0.9]), default_metrics(BINARY))
    assert told["auroc"] is told["average_precision"] is told["balanced_accuracy"] is None
    assert told["accuracy"] == pytest.approx(2 / 3 if ill else 1 / 3)
    assert (told["recall"] is None, told["specificity"] is None) == (not ill, bool(ill))
    assert (told["precision"] is None, told["f1"] is None) == (not ill, not ill)


def test_a_class_that_a_site_lacks_does_not_count_against_it() -> None:
    cases = scored([0, 0, 1, 1], np.eye(3)[[0, 0, 1, 2]])
    assert value(THREE, cases, "recall") == pytest.approx((1 + 1 / 2) / 2)
    assert value(THREE, cases, "auroc") == pytest.approx((1 + 3 / 4) / 2)


def test_a_model_that_never_says_ill_has_precision_and_f1_zero() -> None:
    cases = scored([1, 0], [0.4, 0.3])
    assert value(BINARY, cases, "precision") == value(BINARY, cases, "f1") == 0.0


@pytest.mark.parametrize("task", [BINARY, THREE, LABELS])
def test_a_site_without_cases_has_no_metrics(task: Task) -> None:
    width = 1 if task is BINARY else len(task.classes)
    empty_target = np.zeros((0, 2), np.float32) if task.multi_label else np.zeros(0, np.int64)
    empty = score_classification([], [], empty_target, np.zeros((0, width)))
    assert set(summarise(task, empty, default_metrics(task)).values()) == {None}
    names = default_metrics(task)
    assert set(intervals(task, empty, names, resamples=10, seed=1).values()) == {None}


def test_a_diverged_model_has_no_metrics_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="medfl.common.metrics"):
        told = summarise(BINARY, scored([0, 1], [np.nan, 0.5]), default_metrics(BINARY))
    assert set(told.values()) == {None}
    assert "cases_without_finite_probability=1 of=2" in caplog.text


def test_an_unknown_metric_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(ConfigError) as told:
        summarise(BINARY, EIGHT, ["auroc", "dice", "acuracy"])
    assert len(told.value.faults) == 2
    assert "balanced_accuracy" in told.value.faults[0]
    with pytest.raises(ConfigError, match="dice_spleen"):
        summarise(ORGANS, EIGHT, ["auroc"])
    with pytest.raises(ConfigError, match="auroc"):
        better("loss")


def test_every_default_metric_is_known_and_says_which_way_is_better() -> None:
    for task in (BINARY, THREE, LABELS, ORGANS):
        assert set(default_metrics(task)) <= set(known_metrics(task))
        assert {better(name) for name in known_metrics(task)} == {"higher", "lower"}
    lower = {name for name in METRICS if better(name) == "lower"}
    assert lower == {"brier", "ece", "hd95", "surface_distance", "empty_false_positives"}
    assert (better("dice_liver"), better("hd95_liver")) == ("higher", "lower")


def test_only_distance_metrics_need_distances() -> None:
    assert needs_distances(["dice", "hd95_liver"])
    assert not needs_distances(["dice", "dice_liver", "auroc"])


def test_the_mean_over_sites_leaves_out_sites_that_have_no_value() -> None:
    sites = [{"auroc": 0.5, "f1": None}, {"auroc": None, "f1": None}, {"auroc": 1.0, "f1": None}]
    assert mean_over_sites(sites) == {"auroc": 0.75, "f1": None}
    assert mean_over_sites([]) == {}


def made_up(task: Task, generator: np.random.Generator, n: int) -> tuple[Any, Any]:
    """Targets and probabilities of n cases; tenths, so that ties are common."""
    classes = len(task.classes)
    if task.multi_label:
        target = generator.integers(0, 2, (n, classes)).astype(np.float32)
    else:
        target = generator.integers(0, classes, n)
    return target, generator.integers(0, 11, (n, 1 if task is BINARY else classes)) / 10


@pytest.mark.parametrize("task", [BINARY, THREE, LABELS])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_weighting_a_case_is_the_same_as_having_it_more_than_once(
    task: Task, data: st.DataObject
) -> None:
    n = data.draw(st.integers(2, 12))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    target, probability = made_up(task, generator, n)
    times = generator.integers(0, 4, n)
    cases, repeated = scored(target, probability), np.repeat(np.arange(n), times)
    drawn = Drawn(task, cases, times[None].astype(float))
    written_out = scored(target[repeated], probability[repeated])
    for name, expected in summarise(task, written_out, known_metrics(task)).items():
        weighted = float(METRICS[name].resampled(drawn)[0])
        assert weighted == pytest.approx(np.nan if expected is None else expected, nan_ok=True)


@pytest.mark.parametrize("task", [BINARY, THREE, LABELS])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_metrics_are_those_of_scikit_learn(task: Task, data: st.DataObject) -> None:
    from sklearn import metrics as reference

    n = data.draw(st.integers(2, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    target, probability = made_up(task, generator, n)
    told = summarise(task, scored(target, probability), known_metrics(task))
    if task is THREE:
        truth = target[:, None] == np.arange(3)
        said = probability.argmax(axis=1)[:, None] == np.arange(3)
        assert told["accuracy"] == pytest.approx(
            reference.accuracy_score(target, probability.argmax(axis=1))
        )
    else:
        truth, said = target.reshape(n, -1) == 1, probability > 0.5
    columns = range(truth.shape[1])
    both = [k for k in columns if 0 < truth[:, k].sum() < n]
    present, lacking = ([k for k in columns if m[:, k].any()] for m in (truth, ~truth))

    def mean(score: Callable[..., float], over: list[int], *answers: np.ndarray) -> float | None:
        values = [score(*(a[:, k] for a in answers)) for k in over]
        return pytest.approx(np.mean(values), abs=1e-12) if values else None

    def precision(truth: np.ndarray, said: np.ndarray) -> float:
        return float(reference.precision_score(truth, said, zero_division=0))

    assert told["auroc"] == mean(reference.roc_auc_score, both, truth, probability)
    average = mean(reference.average_precision_score, both, truth, probability)
    assert told["average_precision"] == average
    assert told["recall"] == mean(reference.recall_score, present, truth, said)
    assert told["specificity"] == mean(reference.recall_score, lacking, ~truth, ~said)
    assert told["precision"] == mean(precision, present, truth, said)
    assert told["f1"] == mean(reference.f1_score, present, truth, said)
    if task is not THREE:
        assert told["accuracy"] == mean(reference.accuracy_score, [*columns], truth, said)
        balanced = mean(reference.balanced_accuracy_score, both, truth, said)
        assert told["balanced_accuracy"] == balanced
        brier = mean(reference.brier_score_loss, [*columns], truth, probability)
        assert told["brier"] == brier
