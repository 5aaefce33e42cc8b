"""What every engine does: the clipped sum of a group of units, from one batch of their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from medfl.client.training.units import Gradients

Loss = Callable[[Tensor, Tensor], Tensor]


class NotCoveredError(Exception):
    """An engine has no rule for something in the model; another engine must take it."""


class Bound:
    """The bound on the norm of a unit's gradient. within: units that needed no clipping so far."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.within = 0

    def factors(self, norms: Tensor) -> Tensor:
        """(units,) -> min(1, bound / norm); 0 for a unit whose norm is not a number.

        Such a unit must not escape the bound; its gradient is zeroed as well: 0 · inf is none.
        """
        self.within += int((norms <= self.value).sum())
        # bound / max(norm, bound) is min(1, bound / norm) without a division by zero.
        return torch.where(torch.isfinite(norms), self.value / norms.clamp_min(self.value), 0.0)


class Engine(Protocol):
    """Gradients of a model's trainable parameters, as they are at the time of the call."""

    @property
    def name(self) -> str:
        """For the log."""

    def clipped_sum(
        self, inputs: Tensor, targets: Tensor, sizes: Sequence[int], bound: Bound
    ) -> Gradients:
        """Σ over units of g · min(1, bound / ‖g‖), g the mean gradient of the unit's records.

        inputs (B, ...), targets (B, ...): the records of all units, one unit after another.
        sizes: records of each unit; their sum is B. A unit whose gradient is not a number counts
        as zero.
        """

    def total(self, inputs: Tensor, targets: Tensor) -> Gradients:
        """Σ over records of the gradient, not clipped: a part of one unit's mean."""


def squared_norms(t: Tensor) -> Tensor:
    """(n, ...) -> (n,) float64."""
    norms: Tensor = torch.linalg.vector_norm(t.flatten(1), dim=1)
    return norms.double() ** 2
