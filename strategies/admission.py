"""What an update must satisfy before it touches the model; a bad one costs its site that round."""

from __future__ import annotations

import numpy as np

from medfl.common.messages import Reply
from medfl.common.tensors import Tensors

# More cases than any hospital has: a weight beyond it is a fault or an attack, not a cohort.
MAX_CASES = 10_000_000


def fault_of(update: Reply, weights: Tensors) -> str | None:
    """Why this update is not admitted, or None. Names and shapes are compared with `weights`."""
    if update.refusal:
        return update.refusal
    if not 1 <= update.n_cases <= MAX_CASES:
        return "case count out of range"
    for group in (update.delta, update.control):
        for name, array in group.items():
            if name not in weights:
                return "unknown parameter"
            if array.shape != weights[name].shape:
                return "parameter of another shape"
            if array.dtype != np.float32:
                return "parameter of another type"
            if not np.isfinite(array).all():
                return "value that is not finite"
    return None
