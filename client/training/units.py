"""Whom differential privacy protects: a patient with all of their records, or each record alone.

A patient's contribution is the *mean* of the gradients of all of their records, clipped once.
Mean, not sum: a sum grows with the number of images, so that one clipping bound would cut those
with fifty to a direction and leave those with one alone, and a hospital's habit of taking more
images would move the model. The mean is the gradient of the patient's mean loss, has the scale
that `privacy.clip` was chosen for however many images there are, and averages their noise away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfl.client.training.caseset import CaseSet
from medfl.client.training.draws import names_of
from medfl.common.noise import words_by_name

Unit = Literal["patient", "record"]
Positions = NDArray[np.int64]
Gradients = dict[str, Tensor]


def units_of(cases: CaseSet, unit: Unit) -> list[Positions]:
    """Positions of each unit's records; units in the order in which they first appear."""
    if unit == "record":
        return list(np.arange(len(cases), dtype=np.int64)[:, None])
    found: dict[str, list[int]] = {}
    for position, patient in enumerate(cases.patients):
        found.setdefault(patient, []).append(position)
    return [np.array(positions, dtype=np.int64) for positions in found.values()]


def unit_names(cases: CaseSet, units: Sequence[Positions], unit: Unit) -> list[str]:
    """Who each unit is, whoever else is there."""
    names = cases.patients if unit == "patient" else cases.keys
    return [names[int(positions[0])] for positions in units]


def poisson_batches(names: Sequence[str], sample_rate: float, key: bytes) -> Iterator[Positions]:
    """Endless batches in which every unit takes part with `sample_rate`, on its own; maybe none.

    Who takes part must be as secret as the noise: amplification by sampling rests on it. A unit's
    lot follows from the key, the step and its name, so that nobody's hangs on who else is there.
    """
    units = names_of(names)
    for step in count():
        words = words_by_name(key, f"sampling {step}", units, 2).astype(np.uint64)
        bits = (words[:, 0] << np.uint64(21)) | (words[:, 1] >> np.uint64(11))
        # Multiples of 2^-53 above 0, so that a rate of 1 takes everybody.
        lots = (bits + np.uint64(1)).astype(np.float64) * 2.0**-53
        yield np.flatnonzero(lots <= sample_rate)


def groups(units: Sequence[Positions], at_once: int) -> Iterator[list[Positions]]:
    """The units in order, as many together as have at most `at_once` records; one at least."""
    group: list[Positions] = []
    size = 0
    for unit in units:
        if group and size + len(unit) > at_once:
            yield group
            group, size = [], 0
        group.append(unit)
        size += len(unit)
    if group:
        yield group


def mean_by_unit(gradients: Gradients, sizes: Sequence[int]) -> Gradients:
    """(records, *shape) -> (units, *shape): the mean of each unit's `sizes` records in order.

    Each unit's records are added apart from all others', so that one that is not a number stays
    its own patient's affair.
    """
    if all(size == 1 for size in sizes):
        return gradients
    return {
        name: torch.stack([part.mean(dim=0) for part in torch.split(gradient, list(sizes))])
        for name, gradient in gradients.items()
    }
