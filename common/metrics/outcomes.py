"""A classification's scores as one yes-or-no question a class, which most metrics average over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.metrics.scores import Scores
from medfl.common.study import Task


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """One column a question: the positive class alone (binary), else every class or label.

    truth, predicted: (N, K) bool. probability: (N, K) float64.
    one_of_many: exactly one of the K >= 3 classes holds a case (multi-class).
    """

    truth: NDArray[np.bool_]
    predicted: NDArray[np.bool_]
    probability: NDArray[np.float64]
    one_of_many: bool

    def __len__(self) -> int:
        return len(self.truth)


def outcomes(task: Task, scores: Scores) -> Outcomes:
    """Binary and multi-label: predicted above probability 0.5. Multi-class: the likeliest class."""
    target: NDArray[Any] = scores.columns["target"]
    probability = scores.columns["probability"].astype(np.float64)
    if task.multi_label:
        return Outcomes(target > 0.5, probability > 0.5, probability, one_of_many=False)
    if len(task.classes) == 2:
        positive = probability[:, -1:]
        return Outcomes(target[:, None] == 1, positive > 0.5, positive, one_of_many=False)
    index = np.arange(len(task.classes))
    likeliest = probability.argmax(axis=1)[:, None] if len(probability) else np.zeros((0, 1))
    return Outcomes(target[:, None] == index, likeliest == index, probability, one_of_many=True)
