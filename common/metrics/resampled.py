"""Classification metrics, for many weightings of the cases at once.

Every function takes `weights` (R, N): how often resample r holds case n; and returns (R,), nan
where undefined. Weights of one give the metric itself: scikit-learn's, which takes 25 times as long
and a second to import.

A class that the site's part does not hold is left out of means over classes, so that a hospital
without melanomas is not marked down for them: recall, precision and F1 need a case of the class,
specificity a case without it, AUROC and average precision both. A class that the part holds and
the model never predicts counts as precision 0 and F1 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfl.common.metrics.outcomes import Outcomes

BINS = 15

Values = NDArray[np.float64]
Columns = NDArray[np.bool_]
Area = Callable[[Values, Values], Values]


def accuracy(cases: Outcomes, weights: Values) -> Values:
    """Weighted share of right answers; multi-label: the mean of each label's own."""
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
    """Weighted mean squared error of the probabilities; 0 is perfect.

    Binary: of the positive class, 0..1. Multi-class: summed over the classes, 0..2, as Brier
    (1950, "Verification of forecasts expressed in terms of probability") writes it.
    Multi-label: the mean of each label's own.
    """
    error = (cases.truth - cases.probability) ** 2
    each = error.sum(axis=1) if cases.one_of_many else error.mean(axis=1)
    return _ratio(weights @ each, weights.sum(axis=1))


def ece(cases: Outcomes, weights: Values) -> Values:
    """Expected calibration error over 15 bins of equal width, (0, 1/15] to (14/15, 1].

    Multi-class: confidence of the predicted class against accuracy (Guo et al. 2017, "On
    calibration of modern neural networks", equation 3). Binary: the positive probability against
    the frequency of the positive class (Naeini et al. 2015, "Obtaining well calibrated
    probabilities using Bayesian binning"), because that probability is what a clinician reads.
    Multi-label: the mean of each label's own. The weights move cases between bins' totals.
    """
    happened, probability = calibration_columns(cases)
    total = weights.sum(axis=1)
    each = []
    for k in range(happened.shape[1]):
        in_bin = bin_of(probability[:, k])[:, None] == np.arange(BINS)  # (N, bins)
        gaps = weights @ (in_bin * (happened[:, k] - probability[:, k])[:, None])
        each.append(_ratio(np.abs(gaps).sum(axis=1), total))
    return mean_defined(np.stack(each, axis=1))


def calibration_columns(cases: Outcomes) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What happened, and the probability that was given for it: both (N, K), multi-class (N, 1)."""
    if not cases.one_of_many:
        return cases.truth, cases.probability
    right = np.any(cases.truth & cases.predicted, axis=1, keepdims=True)
    return np.asarray(right), cases.probability.max(axis=1, keepdims=True)


def bin_of(probability: NDArray[np.float64]) -> NDArray[np.intp]:
    """Number of the calibration bin, 0 to 14, of each probability; 0.0 lies in the first."""
    return np.digitize(probability, np.linspace(0, 1, BINS + 1)[1:-1], right=True)


def mean_defined(columns: Values) -> Values:
    """Mean over the columns that are not nan: (R, K) -> (R,), nan where none is."""
    defined = ~np.isnan(columns)
    return _ratio(np.where(defined, columns, 0.0).sum(axis=1), defined.sum(axis=1))


def _ratio(part: Values, whole: NDArray[np.generic]) -> Values:
    """part / whole, nan where the whole is 0."""
    quotient: Values = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
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
