"""A clipping bound that follows a quantile of the units' norms (Andrew et al. 2021, algorithm 1).

Whoever writes a study cannot know how long gradients are at hospitals whose data nobody may see. So
each step also counts, with noise, how many units the bound left as they were, and moves it.

The two answers of a step are one Gaussian mechanism (their theorem 1): a unit moves the gradients'
sum by at most the bound, and the count, taken around one half, by at most one half. With noise of
z_g bounds on the one and sd z_b on the other that is a mechanism of multiplier z, where
z^-2 = z_g^-2 + (2 z_b)^-2. The count gets a fixed share of z^-2, so that what is charged is z, as
without a moving bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from medfl.client.training.engines.engine import Bound
from medfl.client.training.plan import DpPlan
from medfl.common.noise import Keystream

# Of z^-2, which is what a step costs: the gradients' noise grows by 2.6 %.
COUNT_SHARE = 0.05
# By how much a step may move the bound's logarithm; eta_C of Andrew et al., figure 4.
RATE = 0.2


@dataclass(frozen=True, slots=True)
class Noise:
    """gradients: multiplier of the sum's noise. count: sd of the count's; None: nobody counts."""

    gradients: float
    count: float | None

    @classmethod
    def of(cls, dp: DpPlan) -> Noise:
        """What together costs as much as `dp.noise_multiplier` alone."""
        if dp.quantile is None:
            return cls(dp.noise_multiplier, None)
        return cls(
            dp.noise_multiplier / math.sqrt(1 - COUNT_SHARE),
            dp.noise_multiplier / (2 * math.sqrt(COUNT_SHARE)),
        )


class Clipping:
    """The bound from step to step."""

    def __init__(self, dp: DpPlan, expected_batch: float) -> None:
        self._quantile, self._expected = dp.quantile, expected_batch
        self._noise, self._stream = Noise.of(dp), Keystream(dp.key, "clipping")
        self.value = dp.clip

    @property
    def sd(self) -> float:
        """Standard deviation of the noise on the sum of the clipped gradients."""
        return self._noise.gradients * self.value

    def after(self, bound: Bound, n_units: int) -> None:
        """Move it by what a step's bound saw of its `n_units` units."""
        if self._quantile is None or self._noise.count is None:
            return
        # Around one half: a unit that comes or goes then moves the count by one half at most.
        count = bound.within - n_units / 2
        count += self._noise.count * float(self._stream.normals(1)[0])
        share = min(max(count / self._expected + 0.5, 0.0), 1.0)
        self.value *= math.exp(-RATE * (share - self._quantile))
