"""Learning rate and number of steps, from the study alone."""

from __future__ import annotations

import math

from medfl.common.study import Study, Training


def learning_rate_at(training: Training, rounds: int, progress: float, step: float) -> float:
    """The learning rate for the step that begins at `progress`.

    progress: rounds done, with fractions: 2.5 is the middle of round 3. step: one optimiser step
    as a fraction of a round. Warm-up rises linearly and reaches the full rate with its last step;
    the schedule then falls over the remaining rounds to `final_fraction`. `step` divides by 10
    halfway and at three quarters (He et al. 2016), never below `final_fraction`.
    """
    warmup = training.warmup_rounds
    if progress < warmup:
        return training.learning_rate * min(1.0, (progress + step) / warmup)
    done = min(1.0, (progress - warmup) / max(rounds - warmup, 1e-12))
    low = training.final_fraction
    if training.schedule == "cosine":
        factor = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
    elif training.schedule == "linear":
        factor = 1 - (1 - low) * done
    elif training.schedule == "step":
        factor = max(low, 0.1 ** ((done >= 0.5) + (done >= 0.75)))
    else:
        factor = 1.0
    return training.learning_rate * factor


def steps_in_round(study: Study, n_cases: int) -> int:
    """Optimiser steps of one round without differential privacy."""
    training = study.training
    if training.local_steps is not None:
        return training.local_steps
    return (training.local_epochs or 1) * math.ceil(n_cases / training.batch_size)


def sample_rate_for(study: Study, n_units: int) -> float:
    """Poisson sampling rate q: the study's own, else one whose expected batch is its batch_size.

    n_units: patients, or records where the study protects those.
    """
    if study.privacy is not None and study.privacy.sample_rate is not None:
        return study.privacy.sample_rate
    return min(1.0, study.training.batch_size / n_units)


def private_steps_in_round(study: Study, sample_rate: float) -> int:
    """Optimiser steps of one round under Poisson sampling; an epoch is ceil(1 / sample_rate)."""
    training = study.training
    if training.local_steps is not None:
        return training.local_steps
    # 1 / (32 / 96) is 3.0000000000000004 in some roundings; an epoch there is 3 steps, not 4.
    return (training.local_epochs or 1) * math.ceil(round(1 / sample_rate, 9))
