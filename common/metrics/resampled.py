"""The same metrics for many weightings of the cases at once: what makes the bootstrap fast.

Every function takes `weights` (R, N): how often resample r holds case n; and returns (R,), nan
where undefined. With weights of one they equal `medfl.common.metrics.classification`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfl.common.metrics.classification import BINS, bin_of, calibration_columns
from medfl.common.metrics.outcomes import Outcomes

Values = NDArray[np.float64]
Columns = NDArray[np.bool_]
Area = Callable[[Values, Values], Values]


def accuracy(cases: Outcomes, weights: Values) -> Values:
    """Weighted share of right answers."""
    if cases.one_of_many:
        right = (cases.truth & cases.predicted).any(axis=1, keepdims=True)
    else:
        right = cases.truth == cases.predicted
    return mean_defined(_ratio(weights @ right, weights.sum(axis=1, keepdims=True)))


def balanced_accuracy(cases: Outcomes, weights: Values) -> Values:
    """Recall over two classes or more; else the mean of recall and specificity, label by label."""
    found, correct = _found(cases.truth, cases.predicted, weights)
    if cases.one_of_many:
        value = mean_defined(_ratio(correct, found))
        return np.where((found > 0).sum(axis=1) > 1, value, np.nan)
    absent, rejected = _found(~cases.truth, ~cases.predicted, weights)
    return mean_defined((_ratio(correct, found) + _ratio(rejected, absent)) / 2)


def recall(cases: Outcomes, weights: Values) -> Values:
    """Found cases of a class over cases of the class."""
    found, correct = _found(cases.truth, cases.predicted, weights)
    return mean_defined(_ratio(correct, found))


def specificity(cases: Outcomes, weights: Values) -> Values:
    """Recall of "not this class"."""
    absent, rejected = _found(~cases.truth, ~cases.predicted, weights)
    return mean_defined(_ratio(rejected, absent))


def precision(cases: Outcomes, weights: Values) -> Values:
    """Rightly found over found; 0 where a present class is never predicted."""
    found, correct = _found(cases.truth, cases.predicted, weights)
    claimed = weights @ cases.predicted
    value = np.where(claimed > 0, _ratio(correct, claimed), 0.0)
    return mean_defined(np.where(found > 0, value, np.nan))


def f1(cases: Outcomes, weights: Values) -> Values:
    """2 TP / (2 TP + FP + FN)."""
    found, correct = _found(cases.truth, cases.predicted, weights)
    value = _ratio(2 * correct, found + weights @ cases.predicted)
    return mean_defined(np.where(found > 0, value, np.nan))


def auroc(cases: Outcomes, weights: Values) -> Values:
    """Share of (case, other) pairs in the right order, ties counting half (Mann and Whitney)."""

    def area(positive: Values, negative: Values) -> Values:
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return _ratio((positive * below).sum(axis=1), pairs)

    return _ranked(cases, weights, area)


def average_precision(cases: Outcomes, weights: Values) -> Values:
    """Sum over thresholds of precision times the recall gained there."""

    def area(positive: Values, negative: Values) -> Values:
        # From the highest score down: what lies at or above each threshold.
        hits = np.cumsum(positive[:, ::-1], axis=1)
        claims = hits + np.cumsum(negative[:, ::-1], axis=1)
        gained = positive[:, ::-1] * np.where(claims > 0, _ratio(hits, claims), 0.0)
        value = _ratio(gained.sum(axis=1), hits[:, -1])
        return np.where(negative.sum(axis=1) > 0, value, np.nan)

    return _ranked(cases, weights, area)


def brier(cases: Outcomes, weights: Values) -> Values:
    """Weighted mean squared error of the probabilities."""
    error = (cases.truth - cases.probability) ** 2
    each = error.sum(axis=1) if cases.one_of_many else error.mean(axis=1)
    return _ratio(weights @ each, weights.sum(axis=1))


def ece(cases: Outcomes, weights: Values) -> Values:
    """Calibration error over 15 bins; the weights move cases between bins' totals."""
    happened, probability = calibration_columns(cases)
    total = weights.sum(axis=1)
    each = []
    for k in range(happened.shape[1]):
        in_bin = bin_of(probability[:, k])[:, None] == np.arange(BINS)  # (N, bins)
        gaps = weights @ (in_bin * (happened[:, k] - probability[:, k])[:, None])
        each.append(_ratio(np.abs(gaps).sum(axis=1), total))
    return mean_defined(np.stack(each, axis=1))


def mean_defined(columns: Values) -> Values:
    """Mean over the columns that are not nan: (R, K) -> (R,), nan where none is."""
    defined = ~np.isnan(columns)
    return _ratio(np.where(defined, columns, 0.0).sum(axis=1), defined.sum(axis=1))


def _ratio(part: Values, whole: NDArray[np.generic]) -> Values:
    """part / whole, nan where the whole is 0."""
    empty = np.broadcast_to(whole == 0, part.shape)
    quotient: Values = np.divide(part, whole, out=np.full(part.shape, np.nan), where=~empty)
    return quotient


def _found(truth: Columns, predicted: Columns, weights: Values) -> tuple[Values, Values]:
    """Weight of the cases of each class, and of those predicted so: both (R, K)."""
    return weights @ truth, weights @ (truth & predicted)


def _ranked(cases: Outcomes, weights: Values, area: Area) -> Values:
    """Mean over the classes of `area`(weight of cases, of others) by score, ties as one step."""
    each = []
    for k in range(cases.truth.shape[1]):
        order = np.argsort(cases.probability[:, k], kind="stable")
        score, truth = cases.probability[order, k], cases.truth[order, k]
        starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])
        positive, negative = (
            np.add.reduceat(weights[:, order] * chosen, starts, axis=1)
            for chosen in (truth, ~truth)
        )
        each.append(area(positive, negative))
    return mean_defined(np.stack(each, axis=1))


def mean_of_defined(values: Values, weights: Values) -> Values:
    """Weighted mean over the cases whose value is not nan: (N,), (R, N) -> (R,)."""
    defined = ~np.isnan(values)
    return _ratio(weights @ np.where(defined, values, 0.0), weights @ defined)
