"""Classification metrics of one site, from scikit-learn; None where a number would say nothing.

A class that the site's part does not hold is left out of means over classes, so that a hospital
without melanomas is not marked down for them: recall, precision and F1 need a case of the class,
specificity a case without it, AUROC and average precision both. A class that the part holds and
the model never predicts counts as precision 0 and F1 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.metrics.outcomes import Outcomes

BINS = 15

Column = NDArray[Any]
Score = Callable[[Column, Column], float]


def accuracy(cases: Outcomes) -> float | None:
    """Share of right answers; multi-label: the mean of each label's own."""
    from sklearn.metrics import accuracy_score

    if cases.one_of_many:
        return float((cases.truth & cases.predicted).any(axis=1).mean()) if len(cases) else None
    return _macro(accuracy_score, cases.truth, cases.predicted)


def balanced_accuracy(cases: Outcomes) -> float | None:
    """Mean recall over the classes present, which must be two at least; labels: mean of each's."""
    from sklearn.metrics import balanced_accuracy_score

    if cases.one_of_many:
        several = np.count_nonzero(cases.truth.any(axis=0)) > 1
        return recall(cases) if several else None
    return _macro(balanced_accuracy_score, cases.truth, cases.predicted, with_case=1, without=1)


def auroc(cases: Outcomes) -> float | None:
    """Area under the ROC curve, one class against the rest."""
    from sklearn.metrics import roc_auc_score

    return _macro(roc_auc_score, cases.truth, cases.probability, with_case=1, without=1)


def average_precision(cases: Outcomes) -> float | None:
    """Precision at each threshold, weighted by the recall gained there (no interpolation)."""
    from sklearn.metrics import average_precision_score

    return _macro(average_precision_score, cases.truth, cases.probability, with_case=1, without=1)


def recall(cases: Outcomes) -> float | None:
    """Sensitivity: share of the cases of a class that are found."""
    from sklearn.metrics import recall_score

    return _macro(recall_score, cases.truth, cases.predicted, with_case=1)


def specificity(cases: Outcomes) -> float | None:
    """Share of the cases without a class that are told so."""
    from sklearn.metrics import recall_score

    return _macro(recall_score, ~cases.truth, ~cases.predicted, with_case=1)


def precision(cases: Outcomes) -> float | None:
    """Positive predictive value: share of the found cases that are of the class."""
    from sklearn.metrics import precision_score

    def score(truth: Column, predicted: Column) -> float:
        return float(precision_score(truth, predicted, zero_division=0))

    return _macro(score, cases.truth, cases.predicted, with_case=1)


def f1(cases: Outcomes) -> float | None:
    """Harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    return _macro(f1_score, cases.truth, cases.predicted, with_case=1)


def brier(cases: Outcomes) -> float | None:
    """Mean squared error of the probabilities; 0 is perfect.

    Binary: of the positive class, 0..1. Multi-class: summed over the classes, 0..2, as Brier
    (1950, "Verification of forecasts expressed in terms of probability") writes it.
    Multi-label: the mean of each label's own.
    """
    from sklearn.metrics import mean_squared_error

    if not len(cases):
        return None
    error = float(mean_squared_error(cases.truth.astype(np.float64), cases.probability))
    return error * cases.truth.shape[1] if cases.one_of_many else error


def ece(cases: Outcomes) -> float | None:
    """Expected calibration error over 15 bins of equal width, (0, 1/15] to (14/15, 1].

    Multi-class: confidence of the predicted class against accuracy (Guo et al. 2017, "On
    calibration of modern neural networks", equation 3). Binary: the positive probability against
    the frequency of the positive class (Naeini et al. 2015, "Obtaining well calibrated
    probabilities using Bayesian binning"), because that probability is what a clinician reads.
    Multi-label: the mean of each label's own.
    """
    return _macro(_calibration_error, *calibration_columns(cases))


def calibration_columns(cases: Outcomes) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What happened, and the probability that was given for it: both (N, K), multi-class (N, 1)."""
    if not cases.one_of_many:
        return cases.truth, cases.probability
    right = np.any(cases.truth & cases.predicted, axis=1, keepdims=True)
    return np.asarray(right), cases.probability.max(axis=1, keepdims=True)


def bin_of(probability: NDArray[np.float64]) -> NDArray[np.intp]:
    """Number of the calibration bin, 0 to 14, of each probability; 0.0 lies in the first."""
    return np.digitize(probability, np.linspace(0, 1, BINS + 1)[1:-1], right=True)


def _calibration_error(happened: Column, probability: Column) -> float:
    # |B|/N |mean happened - mean probability|, summed over bins: |B| cancels.
    gaps = np.bincount(bin_of(probability), happened - probability, minlength=BINS)
    return float(np.abs(gaps).sum() / len(happened))


def _macro(
    score: Score, truth: Column, answer: Column, *, with_case: int = 0, without: int = 0
) -> float | None:
    """Mean of `score` over the columns with enough cases of the class and enough without it."""
    if not len(truth):
        return None
    found = truth.sum(axis=0)
    usable = np.flatnonzero((found >= with_case) & (len(truth) - found >= without))
    if not len(usable):
        return None
    return float(np.mean([score(truth[:, k], answer[:, k]) for k in usable]))
