"""How much privacy noisy training spends: epsilon of subsampled Gaussian steps, and its inverse.

One step draws each unit with probability q (Poisson), clips, sums, and adds Gaussian noise of
sigma times the clipping bound. Neighbours differ by adding or removing one unit.

Every number here is an upper bound, the smallest of three that hold:

- PRV (Gopi, Lee and Wutschitz 2021, "Numerical composition of differential privacy"), from
  Opacus. Its error is added, so that it lies above the truth by at most twice that error, which
  is 0.2 % of the cheaper bounds, 0.0001 at least, and coarser where the grid would pass a million
  points. It is not asked where the error would exceed 0.5 (as for q = 0.5, sigma = 0.3, 1500
  steps: Opacus alone takes minutes and 5 GB there, for an epsilon of thousands), where delta is
  below 1e-9 (float64 sums end near there), or where every q is 1.
- RDP (Mironov, Talwar and Zhang 2019), from Opacus.
- The Gaussian mechanism without subsampling, exactly (Balle and Wang 2018, "Improving the
  Gaussian mechanism", theorem 8): sampling fewer units never costs more. Tight for q = 1, where
  n steps of sigma are one of sigma / sqrt(n).

Seen for 1, 5, 15 and 1500 steps, q of 0.05, 0.5 and 1, sigma of 0.5 to 65, delta of 1e-5 and
1e-8: PRV answers for every epsilon up to about 80. At q = 1 Opacus's own loss divides by zero on
its way; in a history of both kinds those steps are one Gaussian together, whose exact loss goes
into the convolution. Such histories end within 1 % of dp-accounting's PLD (Doroshenko et al. 2022).
PLD itself is not used: it gives the same figures, and would be a second library to trust. Opacus's
GDP accountant is not offered: that is an approximation, and can promise too little.

Adaptive choice. What a step computes may depend on everything released before. Its noise and rate
are fixed within a study. Between studies they may be chosen by what earlier ones released: RDP's
sum holds then, too, against a limit fixed beforehand (Feldman and Zrnic 2021, "Individual privacy
accounting via a Renyi filter", theorem 4.3), and so does the Gaussian one (Smith and Thakurta 2022,
"Fully adaptive composition for Gaussian differential privacy"). PRV's is proved for noise and rates
that do not depend on what was released; nothing is known to be lost, but that is not a proof. RDP's
is about a tenth to a sixth above it.

A call takes 0.05 to 0.5 s on an idle core, and as much again for each further pair of sigma and q
in the history; equal calls are remembered.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Step = tuple[float, float, int]

_GRID = 2**20
_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256)
_LOW_ORDERS = (1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
# Below, nothing is hidden; above, more noise changes nothing that a float could tell.
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6


def epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Upper bound on epsilon at `delta` after all steps of `history`, in any order.

    history: (noise multiplier sigma, sampling rate q, steps) each; noise of 0, or below 0.001,
        is no privacy (inf).

    Raises:
        ValueError: a number outside its range; nothing is charged then.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must lie between 0 and 1")
    steps_of: dict[tuple[float, float], int] = {}
    for sigma, q, steps in history:
        if not (sigma >= 0 and 0 <= q <= 1 and steps >= 0):
            raise ValueError(f"no such step: noise {sigma}, sampling rate {q}, steps {steps}")
        if q > 0 and steps > 0:
            key = (min(sigma, _MOST_NOISE), q)
            steps_of[key] = steps_of.get(key, 0) + steps
    if any(sigma < _LEAST_NOISE for sigma, _ in steps_of):
        return math.inf
    return _epsilon(tuple(sorted((s, q, n) for (s, q), n in steps_of.items())), delta)


@lru_cache(maxsize=256)
def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    before: tuple[Step, ...] = (),
) -> float:
    """Smallest noise found that keeps `steps` steps within `target_epsilon`; never above it.

    What it spends lies within 1 % below the target. Takes 3 to 6 calls of `epsilon`.
    before: steps taken already that the target covers, too.

    Raises:
        ValueError: a number outside its range, a target that is not above 0, or one that `before`
            has spent already.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"epsilon is {target_epsilon}; it must be a number above 0")
    if sampling_rate == 0 or steps == 0:
        raise ValueError("without a sampled step there is nothing to hide; the noise may be 0")

    def spent(sigma: float) -> float:
        return epsilon([*before, (sigma, sampling_rate, steps)], delta)

    if before and epsilon(before, delta) >= 0.99 * target_epsilon:
        raise ValueError(f"epsilon {target_epsilon} was spent already")
    return _falling_to(target_epsilon, spent)


def _falling_to(target: float, spent: Callable[[float], float]) -> float:
    """An x with .99 target <= spent(x) <= target, for a falling `spent`.

    Regula falsi on log spent over log x, which is nearly a straight line; where that is slow, the
    bracket is halved. Where `spent` jumps over the band, the x just above the jump.
    """
    aim = math.log(0.995 * target)
    x, low, high = 0.0, None, None  # logarithm of x, and (log x, log spent) around the aim
    for attempt in range(100):
        value = spent(math.exp(x))
        if 0.99 * target <= value <= target:
            return math.exp(x)
        here = (x, math.log(value) if value > 0 else -math.inf)
        low, high = (here, high) if value > target else (low, here)
        if low is None or high is None:
            x += min(max(here[1] - aim, -3.0), 3.0)  # as if spent were 1/x
            continue
        if high[0] - low[0] < 1e-4:
            return math.exp(high[0])
        share = 0.5 if attempt % 3 == 2 else (low[1] - aim) / (low[1] - high[1])
        x = low[0] + min(max(share, 0.02), 0.98) * (high[0] - low[0])
    raise ArithmeticError(f"no noise found for epsilon {target}")


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Step, ...], delta: float) -> float:
    if not history:
        return 0.0
    bound = _quick(history, delta)
    if bound == 0 or all(q == 1 for _, q, _ in history):
        return bound
    return min(bound, _prv(history, delta, bound))


def _quick(history: tuple[Step, ...], delta: float) -> float:
    """The smaller of the two bounds that need no convolution."""
    exact_without_sampling = _gaussian(math.sqrt(sum(n / s**2 for s, _, n in history)), delta)
    if all(q == 1 for _, q, _ in history):
        return exact_without_sampling
    return min(exact_without_sampling, _rdp(history, delta))


def _gaussian(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism of sensitivity / sigma = mu, rounded up by 1e-9 of itself."""
    from scipy.special import log_ndtr

    def log_delta(eps: float) -> float:
        # Theorem 8: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu), as a difference of logs.
        left = float(log_ndtr(mu / 2 - eps / mu))
        right = eps + float(log_ndtr(-mu / 2 - eps / mu))
        return left + math.log1p(-math.exp(right - left)) if right < left else -math.inf

    wanted, low, high = math.log(delta), 0.0, 1.0
    if log_delta(0.0) <= wanted:
        return 0.0
    while log_delta(high) > wanted:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(middle) > wanted else (low, middle)
    return high


def _rdp(history: tuple[Step, ...], delta: float) -> float:
    """RDP's bound. Few orders: more would tighten it, and cost seconds."""
    spent = _rdp_at(_ORDERS, history, delta)
    # Orders below 2 are slow where the noise is large, and serve only where it is small.
    return min(spent, _rdp_at(_LOW_ORDERS, history, delta)) if spent > 20 else spent


def _rdp_at(orders: tuple[float, ...], history: tuple[Step, ...], delta: float) -> float:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    rdp = sum(
        compute_rdp(q=q, noise_multiplier=s, steps=n, orders=list(orders)) for s, q, n in history
    )
    with warnings.catch_warnings():
        # Says that a further order would give a lower bound; this one holds all the same.
        warnings.filterwarnings("ignore", "Optimal order is the")
        return max(0.0, float(get_privacy_spent(orders=list(orders), rdp=rdp, delta=delta)[0]))


def _prv(history: tuple[Step, ...], delta: float, bound: float) -> float:
    """PRV's upper bound, or inf where it is not asked or fails. `bound` sets its tolerance."""
    from scipy.integrate import IntegrationWarning

    if delta < 1e-9:
        return math.inf
    try:
        with warnings.catch_warnings():
            # A sum or an integral that went wrong must not become a promise.
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("error", IntegrationWarning)
            spent = _convolved(history, delta, bound)
    except (RuntimeError, ValueError, ArithmeticError, RuntimeWarning, IntegrationWarning) as fault:
        log.info("prv_failed=%s the_rdp_bound_is_used", type(fault).__name__)
        return math.inf
    return max(0.0, spent)  # below 0, delta alone covers it


def _convolved(history: tuple[Step, ...], delta: float, bound: float) -> float:
    """Opacus's PRV with a domain from our quick bounds: its own takes seconds at q = 0.5.

    Gopi et al., theorem 5.5 and remark 5.6: the domain reaches as far as all steps do at a quarter
    of the delta error, and one step at an eighth of its share.
    """
    from opacus.accountants.analysis import prv

    sampled = [(s, q, n) for s, q, n in history if q < 1]
    whole = math.sqrt(sum(n / s**2 for s, q, n in history if q == 1))
    steps, delta_error = [n for _, _, n in sampled] + [1] * (whole > 0), delta / 1000
    reach = _quick(history, delta_error / 4)
    singles = [(s, q, 1) for s, q, _ in sampled]
    singles += [(1 / whole, 1.0, 1)] if whole > 0 else []
    for single in singles:
        reach = max(reach, _quick((single,), delta_error / (8 * sum(steps))))
    fineness = math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    error = max(0.002 * bound, 1e-4, 2 * (reach + 3) * fineness / _GRID)
    if error > 0.5:
        return math.inf
    domain = prv.Domain.create_aligned(-(reach + 3), reach + 3, error / fineness)
    losses: list[Any] = [
        prv.TruncatedPrivacyRandomVariable(
            prv.PoissonSubsampledGaussianPRV(q, s), domain.t_min, domain.t_max
        )
        for s, q, _ in sampled
    ]
    if whole > 0:
        losses.append(_GaussianLoss(whole, domain.t_min, domain.t_max))
    total = prv.compose_heterogeneous([prv.discretize(loss, domain) for loss in losses], steps)
    return float(total.compute_epsilon(delta, delta_error, error)[2])


@dataclass(frozen=True, slots=True)
class _GaussianLoss:
    """The privacy loss of a Gaussian mechanism of sensitivity / sigma = mu: N(mu^2 / 2, mu^2).

    Within (low, high), where the rest of it has no weight that counts (Gopi et al., theorem 5.5).
    """

    mu: float
    low: float
    high: float

    def cdf(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Chance of a loss of at most t."""
        from scipy.special import ndtr

        below, above = (float(ndtr(self._standard(e))) for e in (self.low, self.high))
        inside = ndtr(self._standard(t.clip(self.low, self.high)))
        return (inside - below) / (above - below)  # type: ignore[no-any-return]

    def mean(self) -> float:
        """Of a truncated normal."""
        from scipy.stats import truncnorm

        ends = self._standard(self.low), self._standard(self.high)
        return float(truncnorm.mean(*ends, loc=self.mu**2 / 2, scale=self.mu))

    def _standard(self, t: Any) -> Any:
        return (t - self.mu**2 / 2) / self.mu
