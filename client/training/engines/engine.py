"""What every engine does: the clipped sum of a group of units, from one batch of their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from medfl.client.training.units import Gradients

Loss = Callable[[Tensor, Tensor], Tensor]
# The factor and its product with a number are rounded to float32, each by 2^-24 of itself at most.
_ROUNDED_TWICE = 1 + 2.0**-22
_LARGEST = 1e30
# Numbers of each unit that are made float64 at once: as many as stay in the first cache.
_AT_ONCE = 2**11


class NotCoveredError(Exception):
    """An engine has no rule for something in the model; another engine must take it."""


class Bound:
    """The bound on the norm of a unit's gradient. within: units that needed no clipping so far."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.within = 0

    def factors(self, norms: Tensor) -> Tensor:
        """(units,) float64 -> min(1, bound / norm); 0 for a unit whose norm is not a number.

        Such a unit must not escape the bound; its gradient is zeroed as well: 0 · inf is none. So
        is one beyond 1e30, whose factor would have lost digits. norms: never below the true ones.
        """
        within = norms <= self.value
        self.within += int(within.sum())
        cut = torch.where(norms < _LARGEST, self.value / (norms * _ROUNDED_TWICE), 0.0)
        return torch.where(within, 1.0, cut)


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
    """(n, ...) -> (n,) float64, summed in it: float32 sums of millions end percents too low."""
    found = torch.zeros(len(t), dtype=torch.float64, device=t.device)
    for part in torch.split(t.flatten(1), _AT_ONCE, dim=1):
        found += part.double().square().sum(1)
    return found
