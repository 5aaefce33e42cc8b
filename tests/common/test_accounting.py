from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from medfl.common.accounting import _falling_to, epsilon, noise_multiplier_for

# What PRV may lie above the truth: twice its error of 0.2 % of a bound that is itself too high.
SLACK = 1.01


def exact_gaussian(mu: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8, with the standard library's normal distribution."""
    phi = NormalDist().cdf

    def excess(eps: float) -> float:
        return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu) - delta

    return float(brentq(excess, 0, 30, xtol=1e-10))


def test_a_thousand_steps_spend_what_three_published_accountants_say() -> None:
    spent = epsilon([(1.1, 0.01, 1000)], 1e-5)
    # dp-accounting 0.6 (PLD) 1.5154; Opacus (PRV, error 0.01) 1.5255; prv-accountant up to 1.565.
    assert 1.5154 <= spent <= 1.5255


def test_opacus_own_accountant_agrees_within_its_error() -> None:
    from opacus.accountants import PRVAccountant

    history = [(0.9, 0.02, 200), (1.5, 0.05, 100)]
    accountant = PRVAccountant()
    accountant.history = history
    theirs = accountant.get_epsilon(1e-5, eps_error=0.01)
    assert theirs - 0.02 <= epsilon(history, 1e-5) <= theirs


@pytest.mark.parametrize(
    ("history", "delta", "pld"),
    [
        ([(2.0, 0.5, 20), (4.0, 1.0, 3)], 1e-3, 4.29812),
        ([(2.0, 0.5, 20), (6.0, 1.0, 22)], 1e-5, 6.84096),
        ([(1.0, 0.05, 200), (3.0, 1.0, 1)], 1e-5, 4.98814),
        ([(1.0, 0.05, 200), (10.0, 1.0, 12), (3.0, 1.0, 2)], 1e-5, 5.44113),
        ([(8.0, 1.0, 5), (2.6, 0.25, 30), (12.0, 1.0, 17), (1.4, 0.1, 60)], 1e-4, 3.7648),
        ([(30.0, 1.0, 20), (9.0, 0.5, 20)], 1e-3, 0.71358),
    ],
)
def test_training_beside_full_batches_spends_what_pld_says(history, delta, pld) -> None:
    # dp-accounting 0.6, connect-the-dots, interval 1e-4. Metrics and sums are steps with q = 1.
    assert pld <= epsilon(history, delta) <= pld * SLACK


@pytest.mark.parametrize("mu", [0.01, 1.0, 3.0])
def test_a_full_batch_beside_next_to_nothing_is_the_exact_gaussian(mu: float) -> None:
    exact = exact_gaussian(mu, 1e-5)
    found = epsilon([(1 / mu, 1.0, 1), (1000.0, 1e-6, 1)], 1e-5)
    assert exact <= found <= exact * SLACK + 1e-3


@pytest.mark.parametrize(("sigma", "steps"), [(0.8, 1), (2.0, 1), (5.0, 15), (65.0, 5), (90.0, 10)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_full_batches_spend_exactly_what_one_gaussian_does(
    sigma: float, steps: int, delta: float
) -> None:
    exact = exact_gaussian(math.sqrt(steps) / sigma, delta)
    assert epsilon([(sigma, 1.0, steps)], delta) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.05), (1.0, 0.05), (1.0, 0.5), (3.0, 0.2)])
def test_one_sampled_step_is_the_amplified_gaussian(sigma: float, q: float) -> None:
    # Poisson sampling turns (e, d) into (log(1 + q (exp(e) - 1)), q d), and tightly so.
    delta = 1e-5
    exact = math.log1p(q * math.expm1(exact_gaussian(1 / sigma, delta / q)))
    assert exact <= epsilon([(sigma, q, 1)], delta) <= exact * SLACK


def test_almost_full_batches_are_never_told_to_spend_less_than_they_do() -> None:
    for delta in (1e-4, 1e-9, 1e-12):
        exact = exact_gaussian(math.sqrt(15) / 10, delta)
        assert exact * 0.9999 <= epsilon([(10.0, 0.9999, 15)], delta) <= exact * SLACK


def test_no_step_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([(1.0, 0.1, 0), (0.0, 0.5, 0), (0.0, 0.0, 9)], 1e-5) == 0.0
    assert epsilon([(1.0, 0.1, 10), (0.0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon([(1e-200, 1.0, 1)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("sigma", "q", "steps"),
    [(0.001, 0.5, 5), (0.01, 0.001, 1500), (0.3, 0.5, 1500), (1e6, 0.3, 10), (1e300, 1.0, 10)],
)
def test_extreme_noise_still_gets_a_bound_that_holds(sigma: float, q: float, steps: int) -> None:
    spent = epsilon([(sigma, q, steps)], 1e-5)
    assert 0 <= spent < math.inf
    if sigma < 1:
        # A step alone costs more than this, and further ones never give anything back.
        assert spent > math.log(q) + 1 / (2 * sigma**2)
    else:
        assert spent < 1e-3


def test_steps_count_the_same_however_they_are_written_down() -> None:
    whole = epsilon([(1.0, 0.05, 20), (2.0, 0.1, 10)], 1e-5)
    assert epsilon([(2.0, 0.1, 4), (1.0, 0.05, 20), (2.0, 0.1, 6)], 1e-5) == whole


def test_a_second_study_adds_to_the_first_but_less_than_their_sum() -> None:
    first, second = (1.0, 0.05, 20), (1.4, 0.1, 30)
    both = epsilon([first, second], 1e-5)
    alone = [epsilon([part], 1e-5) for part in (first, second)]
    assert max(alone) < both < sum(epsilon([part], 5e-6) for part in (first, second))


def never_cheaper(sigma: float, q: float, steps: int, delta: float) -> None:
    """More steps, more sampling, less noise or less delta must not cost less."""
    allowed = epsilon([(sigma, q, steps)], delta) / SLACK - 1e-3
    assert epsilon([(sigma, q, 2 * steps)], delta) >= allowed
    assert epsilon([(sigma, 1.3 * q, steps)], delta) >= allowed
    assert epsilon([(0.8 * sigma, q, steps)], delta) >= allowed
    assert epsilon([(sigma, q, steps)], delta / 10) >= allowed


@pytest.mark.parametrize("step", [(0.7, 0.01, 100), (14.0, 0.03, 1), (2.0, 0.2, 20)])
def test_what_hides_less_never_costs_less(step: tuple[float, float, int]) -> None:
    never_cheaper(*step, delta=1e-3)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sigma=st.floats(0.4, 30),
    q=st.floats(0.005, 0.6),
    steps=st.integers(1, 500),
    delta=st.sampled_from([1e-3, 1e-5, 1e-7]),
)
def test_what_hides_less_never_costs_less_anywhere(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    never_cheaper(sigma, q, steps, delta)


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [
        (1.0, 1e-3, 0.5, 20),
        (0.1, 1e-4, 1.0, 10),
        (8.0, 1e-5, 0.01, 3000),
        (3.0, 1e-5, 0.05, 200),
        (0.01, 1e-5, 0.001, 10),
        (10.0, 1e-4, 0.05, 1),
        (50.0, 1e-5, 0.2, 100),
    ],
)
def test_the_noise_for_an_epsilon_spends_almost_all_of_it_and_never_more(
    target: float, delta: float, q: float, steps: int
) -> None:
    sigma = noise_multiplier_for(target, delta, q, steps)
    assert 0.99 * target <= epsilon([(sigma, q, steps)], delta) <= target


def test_the_noise_never_spends_more_than_any_of_many_targets() -> None:
    for i in range(60):
        target = 0.01 * 1.15**i
        sigma = noise_multiplier_for(target, 1e-5, 1.0, 7)
        assert 0.99 * target <= epsilon([(sigma, 1.0, 7)], 1e-5) <= target


def test_where_the_bound_jumps_over_the_target_the_noise_is_on_the_safe_side() -> None:
    found = _falling_to(1.0, lambda sigma: 2.0 if sigma < 3.0 else 0.5)
    assert 3.0 <= found <= 3.001


def test_equal_questions_are_answered_from_memory() -> None:
    from medfl.common import accounting

    epsilon([(1.0, 0.05, 15)], 1e-5)
    misses = accounting._epsilon.cache_info().misses
    epsilon([(1.0, 0.05, 10), (1.0, 0.05, 5)], 1e-5)
    assert accounting._epsilon.cache_info().misses == misses


@pytest.mark.parametrize(
    "step", [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, -0.1, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)]
)
def test_impossible_steps_are_refused(step: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="no such step"):
        epsilon([(1.0, 0.1, 1), step], 1e-5)


def test_impossible_targets_are_refused() -> None:
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(ValueError, match="delta"):
            epsilon([(1.0, 0.1, 1)], delta)
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            noise_multiplier_for(target, 1e-5, 0.1, 1)
    with pytest.raises(ValueError, match="nothing to hide"):
        noise_multiplier_for(1.0, 1e-5, 0.1, 0)


# Google's dp-accounting 0.6 (with attrs 23.2): PLDAccountant(value_discretization_interval=1e-4),
# PoissonSampledDpEvent(q, GaussianDpEvent(sigma)) composed T times, get_epsilon(delta), 5 decimals.
PLD = [
    (0.6, 0.01, 500, 1e-5, 5.80024),
    (0.8, 0.02, 1000, 1e-5, 6.41875),
    (1.0, 0.01, 1000, 1e-5, 1.82824),
    (1.1, 0.01, 1000, 1e-5, 1.51537),
    (1.0, 0.05, 200, 1e-5, 4.76592),
    (1.5, 0.1, 300, 1e-5, 6.29056),
    (2.0, 0.2, 100, 1e-3, 3.52257),
    (4.0, 0.5, 20, 1e-3, 1.61772),
    (4.0, 0.5, 20, 1e-5, 2.40058),
    (6.0, 0.5, 40, 1e-3, 1.47157),
    (14.0, 0.5, 20, 1e-3, 0.35066),
    (30.0, 0.5, 200, 1e-4, 0.72521),
    (0.7, 0.004, 3000, 1e-6, 3.61750),
    (5.0, 0.3, 144, 1e-3, 2.14983),
    (20.0, 1.0, 12, 1e-3, 0.38236),
    (3.0, 1.0, 5, 1e-5, 3.12465),
]


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "pld"), PLD)
def test_ours_is_never_below_an_independent_accountant_and_close_above(
    sigma: float, q: float, steps: int, delta: float, pld: float
) -> None:
    ours = epsilon([(sigma, q, steps)], delta)
    assert pld - 1e-5 <= ours <= 1.01 * pld + 2e-3


def test_rounds_that_differ_agree_with_the_independent_accountant_as_well() -> None:
    ours = epsilon([(0.9, 0.02, 200), (1.5, 0.05, 100), (3.0, 0.3, 30)], 1e-5)
    assert 3.75328 <= ours <= 1.01 * 3.75328


def test_an_accountant_that_promises_too_little_would_be_caught() -> None:
    # Opacus's GDP accountant on the table's first line: an approximation that is 36 % too low.
    from opacus.accountants import GaussianAccountant

    with pytest.warns(UserWarning, match="can underestimate"):
        theirs = GaussianAccountant()
    theirs.history = [(0.6, 0.01, 500)]
    assert theirs.get_epsilon(1e-5) < PLD[0][-1] - 1e-5


def test_the_noise_beside_an_earlier_history_makes_both_fit_together() -> None:
    before = ((4.0, 0.5, 20),)
    sigma = noise_multiplier_for(3.0, 1e-3, 0.2, 50, before)
    assert 2.97 <= epsilon([*before, (sigma, 0.2, 50)], 1e-3) <= 3.0
    assert sigma > noise_multiplier_for(3.0, 1e-3, 0.2, 50)
    with pytest.raises(ValueError, match="spent already"):
        noise_multiplier_for(1.0, 1e-3, 0.2, 50, before)
