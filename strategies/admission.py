"""What an update must satisfy before it touches the model; a bad one costs its site that round."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from medfl.common.messages import Instruction, Reply
from medfl.common.tensors import Tensors

# More cases than any hospital has: a weight beyond it is a fault or an attack, not a cohort.
MAX_CASES = 10_000_000


def fault_of(update: Reply, asked: Instruction, travels: Collection[str]) -> str | None:
    """Why this update is not admitted, or None.

    travels: names of the parameters that the strategy lets leave a hospital. An update has exactly
        these: a mean over some sites' parameters and others' absence would be no mean.
    """
    if update.refusal:
        return update.refusal
    if not 1 <= update.n_cases <= MAX_CASES:
        return "case count out of range"
    controls = [name for name in asked.control if name in travels]
    return _fault(update.delta, asked.weights, travels) or _fault(
        update.control, asked.control, controls
    )


def _fault(group: Tensors, like: Tensors, names: Collection[str]) -> str | None:
    if group.keys() - set(names):
        return "unknown parameter"
    if set(names) - group.keys():
        return "missing parameter"
    for name, array in group.items():
        if array.shape != like[name].shape:
            return "parameter of another shape"
        if array.dtype != np.float32:
            return "parameter of another type"
        if not np.isfinite(array).all():
            return "value that is not finite"
    return None
