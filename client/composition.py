"""What uses of overlapping cohorts add up to, for the patient on whom they weigh most.

A study's epsilon is per its own unit; here everything counts per patient, because a hospital's
promise is to patients. Two uses that share no patient compose in parallel: nobody pays both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfl.common import accounting

Step = tuple[float, float, int]
Ids = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Limit:
    """The most epsilon at a delta."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Charge:
    """One use of patients' data under differential privacy.

    study: digest. name: the study's. run: separates runs of one study, such as tuning trials.
    purpose: what was computed from the data: an update, metrics of one part, or sums.
    round: 0 outside of rounds.
    noise_multiplier, sample_rate, steps: of the Gaussian steps, per `unit`.
    """

    study: str
    name: str
    run: str
    purpose: Literal["training", "validation", "test", "statistics"]
    round: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    unit: Literal["patient", "record"] = "patient"

    @property
    def step(self) -> Step:
        """(noise multiplier, sampling rate, steps), per unit."""
        return self.noise_multiplier, self.sample_rate, self.steps


def per_patient(charge: Charge, most_records: int) -> Step:
    """The charge's step for a patient with `most_records` records in the cohort.

    Where records are drawn and clipped on their own, k of one patient move the sum by up to k
    bounds, and one or more are drawn with probability 1 - (1 - q)^k. That all k are drawn whenever
    one is bounds this from above (Choquette-Choo et al. 2023, mixture of Gaussians, dominance).
    """
    sigma, q, steps = charge.step
    k = 1 if charge.unit == "patient" else most_records
    return sigma / k, q if k == 1 else -np.expm1(k * np.log1p(-q)) if q < 1 else 1.0, steps


def heaviest(
    uses: Sequence[tuple[str, Step]], sets: Mapping[str, Ids], among: Ids
) -> list[list[Step]]:
    """The histories that weigh most on the patients of `among`; others are contained in these.

    uses: (cohort, step) each. sets: the sorted patients of each cohort. Patients who are in the
    same cohorts have one history; one whose cohorts are all among another's weighs less.
    """
    cohorts = sorted({cohort for cohort, _ in uses})
    inside = np.stack([np.isin(among, sets[c]) for c in cohorts], axis=1) if cohorts else None
    if inside is None or not len(among):
        return [[]]
    rows = np.unique(inside, axis=0)
    kept = [
        a
        for i, a in enumerate(rows)
        if not any(j != i and bool((a <= b).all()) for j, b in enumerate(rows))
    ]
    found = [{c for c, there in zip(cohorts, row, strict=True) if there} for row in kept]
    return [[step for cohort, step in uses if cohort in mine] for mine in found]


def spent(histories: Sequence[Sequence[Step]], delta: float) -> float:
    """Epsilon of the worst of some histories."""
    return max((accounting.epsilon(tuple(h), delta) for h in histories), default=0.0)


def with_step(histories: Sequence[Sequence[Step]], step: Step) -> list[list[Step]]:
    """Each history and one step more."""
    return [[*history, step] for history in histories]


def most_steps(histories: Sequence[Sequence[Step]], step: Step, limit: Limit) -> int:
    """How many of the step's own number of steps fit beside the histories; by halving."""
    sigma, q, wanted = step
    low, high = 0, wanted + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = spent(with_step(histories, (sigma, q, middle)), limit.delta) <= limit.epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def largest_epsilon(
    histories: Sequence[Sequence[Step]], step: Step, limit: Limit, delta: float
) -> float:
    """The epsilon at `delta` that a use of this rate and length may have beside the histories."""
    _, q, steps = step
    try:
        sigma = max(
            accounting.noise_multiplier_for(limit.epsilon, limit.delta, q, steps, tuple(history))
            for history in histories
        )
    except ValueError:
        return 0.0
    return accounting.epsilon(((sigma, q, steps),), delta)
