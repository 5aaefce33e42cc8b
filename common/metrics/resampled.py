"""Metrics for many weightings of the cases at once.

Every function takes the cases as they were drawn and returns (R,), one value a resample, nan where
undefined. Weights of one give the metric itself: scikit-learn's, which takes 25 times as long and a
second to import.

A class that the site's part does not hold is left out of means over classes, so that a hospital
without melanomas is not marked down for them: recall, precision and F1 need a case of the class,
specificity a case without it, AUROC and average precision both. A class that the part holds and
the model never predicts counts as precision 0 and F1 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medfl.common.metrics.outcomes import Outcomes, outcomes
from medfl.common.metrics.scores import Scores
from medfl.common.study import Task

BINS = 15

Values = NDArray[np.float64]
Area = Callable[[Values, Values], Values]

_EDGES = np.linspace(0, 1, BINS + 1)[1:-1]


@dataclass(frozen=True, eq=False)
class Drawn:
    """The cases of one part of one site, as often as each resample holds them.

    weights: (R, N) whole numbers, so that sums and differences of them are exact. What several
    metrics need is made once: a site of twenty cases is measured as often as one of thousands.
    """

    task: Task
    scores: Scores
    weights: Values

    @cached_property
    def cases(self) -> Outcomes:
        """A classification's cases as questions with yes or no as answer."""
        return outcomes(self.task, self.scores)

    @cached_property
    def total(self) -> Values:
        """(R, 1): cases drawn."""
        return np.asarray(self.weights.sum(axis=1, keepdims=True))

    @cached_property
    def found(self) -> Values:
        """(R, K): cases of each class."""
        return self.weights @ self.cases.truth

    @cached_property
    def claimed(self) -> Values:
        """(R, K): cases predicted to be of each class."""
        return self.weights @ self.cases.predicted

    @cached_property
    def correct(self) -> Values:
        """(R, K): cases of each class predicted so."""
        return self.weights @ (self.cases.truth & self.cases.predicted)

    @cached_property
    def absent(self) -> Values:
        """(R, K): cases not of each class."""
        return self.total - self.found

    @cached_property
    def rejected(self) -> Values:
        """(R, K): cases not of each class, nor predicted to be."""
        return self.absent - self.claimed + self.correct

    @cached_property
    def ranked(self) -> list[tuple[Values, Values]]:
        """A class: weight of its cases and of the others by score, ascending, ties as one step."""
        cases, found = self.cases, []
        for k in range(cases.truth.shape[1]):
            order = np.argsort(cases.probability[:, k], kind="stable")
            score, truth = cases.probability[order, k], cases.truth[order, k]
            starts = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
            drawn = self.weights[:, order]
            all_ = np.add.reduceat(drawn, starts, axis=1)
            positive = np.add.reduceat(drawn * truth, starts, axis=1)
            found.append((positive, all_ - positive))
        return found


def accuracy(drawn: Drawn) -> Values:
    """Weighted share of right answers; multi-label: the mean of each label's own."""
    right = drawn.correct + drawn.rejected
    if drawn.cases.one_of_many:
        right = drawn.correct.sum(axis=1, keepdims=True)
    return mean_defined(_ratio(right, drawn.total))


def balanced_accuracy(drawn: Drawn) -> Values:
    """Recall over two classes or more; else the mean of recall and specificity, label by label."""
    each = _ratio(drawn.correct, drawn.found)
    if drawn.cases.one_of_many:
        return np.where((drawn.found > 0).sum(axis=1) > 1, mean_defined(each), np.nan)
    return mean_defined((each + _ratio(drawn.rejected, drawn.absent)) / 2)


def recall(drawn: Drawn) -> Values:
    """Found cases of a class over cases of the class."""
    return mean_defined(_ratio(drawn.correct, drawn.found))


def specificity(drawn: Drawn) -> Values:
    """Recall of "not this class"."""
    return mean_defined(_ratio(drawn.rejected, drawn.absent))


def precision(drawn: Drawn) -> Values:
    """Rightly found over found; 0 where a present class is never predicted."""
    value = np.where(drawn.claimed > 0, _ratio(drawn.correct, drawn.claimed), 0.0)
    return mean_defined(np.where(drawn.found > 0, value, np.nan))


def f1(drawn: Drawn) -> Values:
    """2 TP / (2 TP + FP + FN)."""
    value = _ratio(2 * drawn.correct, drawn.found + drawn.claimed)
    return mean_defined(np.where(drawn.found > 0, value, np.nan))


def auroc(drawn: Drawn) -> Values:
    """Share of (case, other) pairs in the right order, ties counting half (Mann and Whitney)."""

    def area(positive: Values, negative: Values) -> Values:
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        return _ratio((positive * below).sum(axis=1), pairs)

    return _by_class(drawn, area)


def average_precision(drawn: Drawn) -> Values:
    """Sum over thresholds of precision times the recall gained there."""

    def area(positive: Values, negative: Values) -> Values:
        # From the highest score down: what lies at or above each threshold.
        hits = np.cumsum(positive[:, ::-1], axis=1)
        claims = hits + np.cumsum(negative[:, ::-1], axis=1)
        gained = positive[:, ::-1] * np.where(claims > 0, _ratio(hits, claims), 0.0)
        value = _ratio(gained.sum(axis=1), hits[:, -1])
        return np.where(negative.sum(axis=1) > 0, value, np.nan)

    return _by_class(drawn, area)


def brier(drawn: Drawn) -> Values:
    """Weighted mean squared error of the probabilities; 0 is perfect.

    Binary: of the positive class, 0..1. Multi-class: summed over the classes, 0..2, as Brier
    (1950, "Verification of forecasts expressed in terms of probability") writes it.
    Multi-label: the mean of each label's own.
    """
    cases = drawn.cases
    error = (cases.truth - cases.probability) ** 2
    each = error.sum(axis=1) if cases.one_of_many else error.mean(axis=1)
    return _ratio(drawn.weights @ each, drawn.total[:, 0])


def ece(drawn: Drawn) -> Values:
    """Expected calibration error over 15 bins of equal width, (0, 1/15] to (14/15, 1].

    Multi-class: confidence of the predicted class against accuracy (Guo et al. 2017, "On
    calibration of modern neural networks", equation 3). Binary: the positive probability against
    the frequency of the positive class (Naeini et al. 2015, "Obtaining well calibrated
    probabilities using Bayesian binning"), because that probability is what a clinician reads.
    Multi-label: the mean of each label's own. The weights move cases between bins' totals.
    """
    happened, probability = calibration_columns(drawn.cases)
    each = []
    for k in range(happened.shape[1]):
        in_bin = bin_of(probability[:, k])[:, None] == np.arange(BINS)  # (N, bins)
        gaps = drawn.weights @ (in_bin * (happened[:, k] - probability[:, k])[:, None])
        each.append(_ratio(np.abs(gaps).sum(axis=1), drawn.total[:, 0]))
    return mean_defined(np.stack(each, axis=1))


def calibration_columns(cases: Outcomes) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What happened, and the probability that was given for it: both (N, K), multi-class (N, 1)."""
    if not cases.one_of_many:
        return cases.truth, cases.probability
    right = np.any(cases.truth & cases.predicted, axis=1, keepdims=True)
    return np.asarray(right), cases.probability.max(axis=1, keepdims=True)


def bin_of(probability: NDArray[np.float64]) -> NDArray[np.intp]:
    """Number of the calibration bin, 0 to 14, of each probability; 0.0 lies in the first."""
    return np.digitize(probability, _EDGES, right=True)


def mean_defined(columns: Values) -> Values:
    """Mean over the columns that are not nan: (R, K) -> (R,), nan where none is."""
    if columns.shape[1] == 1:
        return columns[:, 0]
    defined = ~np.isnan(columns)
    return _ratio(np.where(defined, columns, 0.0).sum(axis=1), defined.sum(axis=1))


def _ratio(part: Values, whole: NDArray[np.generic]) -> Values:
    """part / whole, nan where the whole is 0."""
    quotient: Values = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
    return quotient


def _by_class(drawn: Drawn, area: Area) -> Values:
    """Mean over the classes of `area`(weight of cases, of others) by score."""
    each = [area(positive, negative) for positive, negative in drawn.ranked]
    return mean_defined(np.stack(each, axis=1))


def mean_of_defined(values: Values, weights: Values) -> Values:
    """Weighted mean over the cases whose value is not nan: (N,), (R, N) -> (R,)."""
    defined = ~np.isnan(values)
    return _ratio(weights @ np.where(defined, values, 0.0), weights @ defined)
