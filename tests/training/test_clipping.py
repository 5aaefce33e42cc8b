"""A bound that follows a quantile: what it costs, where it goes, and what one unit can do to it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from medfl.client.training.clipping import COUNT_SHARE, RATE, Clipping, Noise
from medfl.client.training.engines.engine import Bound
from medfl.client.training.loop import train
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.noise import Keystream, key_from
from medfl.common.statistics import Shared

PRIVATE = Shared(private=True)
KEY = key_from(1, "clipping")


def plan(noise_multiplier: float = 0.0, **changes: float) -> DpPlan:
    return DpPlan(noise_multiplier, 0.5, 2.0, key=KEY, **{"quantile": 0.5, **changes})


def seen(within: int) -> Bound:
    bound = Bound(1.0)
    bound.within = within
    return bound


def test_the_two_noises_together_cost_what_the_one_did() -> None:
    noise = Noise.of(plan(1.5))
    # Andrew et al. 2021, theorem 1, by hand: 1.5 / sqrt(.95) and 1.5 / (2 sqrt(.05)).
    assert noise.gradients == pytest.approx(1.53897, rel=1e-5)
    assert noise.count == pytest.approx(3.35410, rel=1e-5)
    assert noise.gradients**-2 + (2 * noise.count) ** -2 == pytest.approx(1.5**-2)
    assert Noise.of(replace(plan(1.5), quantile=None)) == Noise(1.5, None)


def test_a_unit_moves_both_answers_by_no_more_than_they_are_noised_for() -> None:
    """With the largest gradient, over all batches that it may come to: the joint norm is 1/z."""
    z = 0.8
    noise = Noise.of(plan(z))
    for within in (0, 1):
        count = within - 1 / 2
        moved = (1 / noise.gradients, count / noise.count)
        assert math.hypot(*moved) == pytest.approx(1 / z)


def test_a_step_by_hand() -> None:
    clipping = Clipping(plan(), expected_batch=10.0)
    clipping.after(seen(within=8), n_units=10)
    # 8 of 10 units were within; half of them should be.
    assert clipping.value == pytest.approx(2.0 * math.exp(-RATE * (0.8 - 0.5)))
    clipping.after(seen(within=0), n_units=0)  # an empty batch says nothing: (0 - 0)/10 + 1/2
    assert clipping.value == pytest.approx(2.0 * math.exp(-RATE * 0.3))


def test_the_count_is_noised_by_a_keystream_of_its_own() -> None:
    clipping = Clipping(plan(1.0), expected_batch=100.0)
    clipping.after(seen(within=60), n_units=100)
    normal = float(Keystream(KEY, "clipping").normals(1)[0])
    share = 0.6 + normal / (2 * math.sqrt(COUNT_SHARE)) / 100
    assert clipping.value == pytest.approx(2.0 * math.exp(-RATE * (share - 0.5)))


def test_no_count_moves_the_bound_further_than_a_whole_batch_could() -> None:
    clipping = Clipping(plan(1e6), expected_batch=1.0)
    for _ in range(20):
        before = clipping.value
        clipping.after(seen(within=1), n_units=1)
        assert math.exp(-RATE / 2) <= clipping.value / before <= math.exp(RATE / 2)


def test_the_bound_that_stays_stays() -> None:
    clipping = Clipping(replace(plan(1.0), quantile=None), expected_batch=10.0)
    clipping.after(seen(within=8), n_units=10)
    assert (clipping.value, clipping.sd) == (2.0, 2.0)


@pytest.mark.parametrize("start", [0.05, 10.0])
@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_training_finds_the_quantile_from_far_away(
    make_study, make_cases, start: float, quantile: float
) -> None:
    study = make_study(features=2, learning_rate=1e-9, batch_size=200, local_steps=120)
    rng = np.random.default_rng(0)
    cases = make_cases(rng.normal(size=(400, 2)).astype(np.float32), rng.integers(0, 2, 400))
    model = build_model(study, PRIVATE, n_features=2, seed=0)
    # At weights of zero a record's gradient is (p - y) (x, 1) with p = 1/2.
    norms = 0.5 * np.sqrt(1 + (np.asarray(cases.inputs) ** 2).sum(axis=1))
    dp = DpPlan(1.0, 0.5, start, quantile, key=KEY)
    outcome = train(model, cases, study, PRIVATE, TrainPlan(1, 1, seed=0, dp=dp))
    assert outcome.clip is not None
    assert np.mean(norms <= outcome.clip) == pytest.approx(quantile, abs=0.1)


def test_noise_follows_the_bound(make_study, make_cases) -> None:
    """Nobody is drawn, so that the step is noise alone: z / sqrt(.95) times the bound."""
    n, rate = 20_000, 1e-9
    study = make_study(features=1, learning_rate=1.0, batch_size=1, local_steps=1)
    model = build_model(study, PRIVATE, n_features=n, seed=0)
    cases = make_cases(np.ones((4, n), np.float32), np.array([0, 1, 0, 1]))
    dp = DpPlan(3.0, rate, 0.5, 0.5, n_declared=1, key=KEY)
    train(model, cases, study, PRIVATE, TrainPlan(1, 1, seed=0, dp=dp))
    noise = get_weights(model)["1.weight"][0].astype(np.float64) * rate
    assert noise.std() == pytest.approx(1.5 / math.sqrt(0.95), rel=0.02)


def test_units_within_the_bound_are_counted_and_broken_ones_are_not() -> None:
    bound = Bound(2.0)
    factors = bound.factors(torch.tensor([1.0, 2.0, 4.0, math.inf, math.nan]))
    assert factors.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])
    assert bound.within == 2
    bound.factors(torch.tensor([0.0]))
    assert bound.within == 3
