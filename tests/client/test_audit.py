"""An attack on our own training that bounds epsilon from below, in one run.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run": each of m canaries
is there or not by a fair coin; who sees only what was released guesses some of the coins. Too many
right guesses disprove the epsilon that was promised. It sees an accountant that forgets, and not
noise that is half of what it should be: that is what tests/training/test_noise.py is for.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from medfl.client.composition import Charge, spent
from medfl.client.ledger import Ledger
from medfl.client.training.engines.engine import Bound
from medfl.client.training.engines.materialised import Materialised
from medfl.client.training.plan import DpPlan
from medfl.client.training.private import noise_generator, noisy_mean, sum_of_units
from medfl.client.training.units import poisson_batches
from medfl.common.noise import key_from

CANARIES, GUESSES, ROUNDS = 2000, 400, 20
SIGMA, RATE, CLIP, DELTA = 4.0, 0.5, 0.7, 1e-5


def p_value(guesses: int, right: int, eps: float, delta: float, canaries: int) -> float:
    """Chance of so many right guesses if (eps, delta) held: theorem 5.2, as in its appendix D."""
    q = 1 / (1 + np.exp(-eps))
    tail = stats.binom.sf(right - 1, guesses, q)
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    worst = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return float(tail) + worst * delta * 2 * canaries


def lower_bound(guesses: int, right: int, delta: float = DELTA, level: float = 0.05) -> float:
    """The epsilon that is disproved with confidence 1 - level."""
    low, high = 0.0, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        disproved = p_value(guesses, right, middle, delta, CANARIES) < level
        low, high = (middle, high) if disproved else (low, middle)
    return low


def right_guesses(seed: int, noise_multiplier: float = SIGMA) -> int:
    """Train ROUNDS rounds on the canaries that the coins chose; guess from the sum released.

    A canary is a patient whose gradient is one coordinate that nobody else touches.
    """
    there = np.random.default_rng(seed).random(CANARIES) < 0.5
    units = list(np.flatnonzero(there)[:, None])

    def fetch(positions):
        inputs = torch.zeros(len(positions), CANARIES)
        inputs[torch.arange(len(positions)), torch.from_numpy(positions)] = 1e6
        return inputs, torch.zeros(len(positions))

    weights = {"w": torch.nn.Parameter(torch.zeros(CANARIES))}
    engine = Materialised(weights, lambda _, x, y: {"w": x})
    released = np.zeros(CANARIES)
    for round_ in range(ROUNDS):
        dp = DpPlan(noise_multiplier, RATE, CLIP, key=key_from(seed, "round", round_))
        (drawn,) = islice(poisson_batches([str(u[0]) for u in units], RATE, dp.key), 1)
        batch = [units[i] for i in drawn]
        summed = sum_of_units(batch, 64, weights, engine, fetch, Bound(CLIP))
        released += noisy_mean(
            summed, noise_multiplier * CLIP, RATE * CANARIES, noise_generator(dp)
        )["w"].numpy()
    order = np.argsort(released)
    out, in_ = order[: GUESSES // 2], order[-GUESSES // 2 :]
    return int(np.sum(~there[out]) + np.sum(there[in_]))


def claimed(folder: Path) -> float:
    """Epsilon by the ledger after all rounds."""
    ledger, patients = Ledger(folder), [f"canary-{i}" for i in range(CANARIES)]
    for round_ in range(ROUNDS):
        charge = Charge("study", "s", "main", "training", round_, SIGMA, RATE, 1)
        ledger.settle(ledger.reserve(charge, patients))
    return spent(ledger.heaviest(), DELTA)


@pytest.fixture(scope="module")
def right() -> int:
    return right_guesses(seed=0)


def test_the_bound_is_that_of_the_paper_by_hand() -> None:
    # Randomised response, delta 0: all 10 right under e^eps = 1 has chance 2^-10.
    assert p_value(10, 10, 0.0, 0.0, 10) == pytest.approx(2**-10)
    # Half right disproves nothing; all of 400 right disprove epsilon up to log(q / (1 - q)),
    # where q^400 = .05.
    assert lower_bound(GUESSES, GUESSES // 2) == 0.0
    q = 0.05 ** (1 / GUESSES)
    assert lower_bound(GUESSES, GUESSES, delta=0.0) == pytest.approx(np.log(q / (1 - q)), abs=2e-3)


def test_the_ledger_claims_more_than_the_attack_can_show(right: int, tmp_path: Path) -> None:
    assert 0.5 < lower_bound(GUESSES, right) < claimed(tmp_path / "ledger")


def test_an_accountant_that_forgets_every_round_is_caught(right: int, tmp_path: Path) -> None:
    first_round_only = Ledger(tmp_path / "ledger")
    charge = Charge("study", "s", "main", "training", 1, SIGMA, RATE, 1)
    first_round_only.reserve(charge, ["canary-0"])
    assert spent(first_round_only.heaviest(), DELTA) < lower_bound(GUESSES, right)


def test_training_without_noise_is_caught(tmp_path: Path) -> None:
    found = right_guesses(seed=1, noise_multiplier=0.3)
    assert lower_bound(GUESSES, found) > claimed(tmp_path / "ledger")


def test_guessing_from_nothing_shows_nothing() -> None:
    # Noise 300 times as large hides everything.
    assert lower_bound(GUESSES, right_guesses(seed=2, noise_multiplier=1200.0)) < 0.3
