"""DP-SGD: clipping by hand, per-record gradients against single backward passes, the noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from medfl.client.training import private
from medfl.client.training.engines.engine import Bound
from medfl.client.training.engines.materialised import clipped_sum, per_record_gradients
from medfl.client.training.loop import train
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.client.training.private import chunk_size, noise_generator, noisy_mean
from medfl.client.training.units import poisson_batches
from medfl.common import tensors
from medfl.common.errors import ConfigError
from medfl.common.losses import build_loss
from medfl.common.models import DP_MODELS, build_model
from medfl.common.models.weights import get_weights
from medfl.common.statistics import Shared

PRIVATE = Shared(private=True)
KEY = bytes(32)
NAMES = [f"p{i}" for i in range(50)]
SILENT = DpPlan(noise_multiplier=0.0, sample_rate=1.0, clip=1.0, key=KEY)
PLAN = TrainPlan(round=1, rounds=1, seed=3, dp=SILENT)


def test_clipping_scales_each_record_by_its_norm_over_all_parameters() -> None:
    # Norms 5 and 0.5: the first shrinks to norm 1, the second stays.
    gradients = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[-4.0], [0.4]])}
    total = clipped_sum(gradients, Bound(1.0))
    assert total["a"].tolist() == pytest.approx([0.6 + 0.3])
    assert total["b"].tolist() == pytest.approx([-0.8 + 0.4])


def test_no_record_moves_the_sum_by_more_than_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {"w": torch.randn(50, 7, 3, generator=generator) * 10, "b": torch.randn(50, 2)}
    for record in range(50):
        alone = {name: g[record : record + 1].clone() for name, g in gradients.items()}
        norm = sum(float((g**2).sum()) for g in clipped_sum(alone, Bound(0.7)).values()) ** 0.5
        assert norm <= 0.7 * (1 + 1e-6)


def test_a_gradient_that_is_not_a_number_counts_as_zero() -> None:
    gradients = {"a": torch.tensor([[float("nan")], [0.3]]), "b": torch.tensor([[1.0], [0.4]])}
    assert clipped_sum(gradients, Bound(1.0))["a"].tolist() == pytest.approx([0.3])
    assert clipped_sum({"a": torch.zeros(3, 2)}, Bound(1.0))["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        *((name, 2) for name in DP_MODELS if name not in ("resnet34", "resnet50")),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("resnet34", "resnet50")),
        *((name, 3) for name in ("cnn", "unet", "segresnet")),
    ],
)
def test_per_record_gradients_are_those_of_single_backward_passes(
    name, dimensions, make_tried
) -> None:
    study, x, y = make_tried(name, dimensions)
    model = build_model(study, PRIVATE, seed=0).double()
    loss_of = build_loss(study, PRIVATE)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = per_record_gradients(model, loss_of)(parameters, x, y)
    for record in range(2):
        model.zero_grad()
        loss_of(model(x[record : record + 1]), y[record : record + 1]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key][record], parameter.grad, atol=1e-9, rtol=1e-6)


def test_they_are_also_those_of_opacus_hooks(make_tried) -> None:
    from opacus import GradSampleModule

    study, x, y = make_tried("cnn", 2)
    model = build_model(study, PRIVATE, seed=0).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = per_record_gradients(model, build_loss(study, PRIVATE))(parameters, x, y)
    hooked = GradSampleModule(model)
    # Inputs that ask for gradients keep torch from warning about the hook of the first layer.
    build_loss(study, PRIVATE)(hooked(x.requires_grad_()), y).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad_sample, atol=1e-9, rtol=1e-6)


def test_one_private_step_without_noise_by_hand(make_study, make_cases) -> None:
    # At zero weights the gradients are (1/2 - y)(x, 1): (-1.5, -2, -.5) and (.15, 0, .5).
    # Norms 2.55 and 0.522; the first is clipped to 1, the sum divided by q · n = 2.
    cases = make_cases(np.array([[3, 4], [0.3, 0]], np.float32), np.array([1, 0]))
    study = make_study(features=2, learning_rate=0.1, batch_size=2)
    model = build_model(study, PRIVATE, n_features=2, seed=0)
    outcome = train(model, cases, study, PRIVATE, PLAN)
    norm = (1.5**2 + 2**2 + 0.5**2) ** 0.5
    total = np.array([-1.5, -2, -0.5]) / norm + np.array([0.15, 0, 0.5])
    weights = get_weights(model)
    found = [*weights["1.weight"][0], *weights["1.bias"]]
    assert found == pytest.approx(list(-0.1 * total / 2), rel=1e-5)
    assert (outcome.steps, outcome.loss) == (1, None)


def test_chunks_change_memory_and_nothing_else(make_study, make_cases, monkeypatch) -> None:
    study = make_study("cnn", batch_size=8, local_steps=1)
    cases = make_cases(study=study, n=8)
    results = []
    for most in (private.MOST_NUMBERS, 1):
        monkeypatch.setattr(private, "MOST_NUMBERS", most)
        model = build_model(study, PRIVATE, seed=0)
        results.append(chunk_size(model.parameters(), 8))
        train(model, cases, study, PRIVATE, PLAN)
        results.append(get_weights(model)["0.weight"])
    assert (results[0], results[2]) == (8, 1)
    np.testing.assert_allclose(results[1], results[3], atol=1e-6)


def test_an_empty_batch_is_a_step_of_noise_with_the_promised_spread(make_study, make_cases) -> None:
    n_features, q = 20_000, 1e-9
    study = make_study(features=1, learning_rate=1.0, batch_size=1, local_steps=1)
    model = build_model(study, PRIVATE, n_features=n_features, seed=0)
    cases = make_cases(np.ones((4, n_features), np.float32), np.array([0, 1, 0, 1]))
    dp = DpPlan(noise_multiplier=3.0, sample_rate=q, clip=0.5)
    outcome = train(model, cases, study, PRIVATE, replace(PLAN, dp=dp))
    noise = get_weights(model)["1.weight"] * q * 4
    assert outcome.steps == 1
    # Four standard errors of a standard deviation are 4 / sqrt(2 · 20000) = 2 %.
    assert noise.std() == pytest.approx(1.5, rel=0.02)
    assert abs(noise.mean()) < 4 * 1.5 / n_features**0.5


def test_noise_is_divided_by_the_expected_batch_not_by_the_drawn_one() -> None:
    ones = noisy_mean({"w": torch.tensor([1.0])}, 6.0, 10.0, torch.ones_like)
    assert float(ones["w"]) == pytest.approx((1 + 6) / 10)


def test_a_declared_number_of_units_takes_the_place_of_the_counted_one(
    make_study, make_cases
) -> None:
    study = make_study(features=2, learning_rate=0.1, batch_size=2)
    cases = make_cases(np.array([[3, 4], [0.3, 0]], np.float32), np.array([1, 0]))
    moved = []
    for declared in (None, 2, 8):
        model = build_model(study, PRIVATE, n_features=2, seed=0)
        dp = replace(SILENT, n_declared=declared)
        train(model, cases, study, PRIVATE, replace(PLAN, dp=dp))
        moved.append(get_weights(model)["1.weight"])
    np.testing.assert_array_equal(moved[0], moved[1])
    np.testing.assert_allclose(moved[2], moved[1] / 4, rtol=1e-6)


def test_steps_and_parameters_never_share_noise() -> None:
    normal = noise_generator(SILENT)
    first, second = normal(torch.zeros(1000)), normal(torch.zeros(1000))
    assert abs(float((first * second).mean())) < 0.15
    assert torch.equal(noise_generator(SILENT)(torch.zeros(1000)), first)


def test_two_runs_under_one_seed_have_different_noise_unless_a_key_is_handed_in(
    make_study, make_cases
) -> None:
    study = make_study("cnn", batch_size=4)
    cases = make_cases(study=study, n=8)

    def digest(**key: bytes) -> str:
        torch.manual_seed(0)
        model = build_model(study, PRIVATE, seed=0)
        # Everybody takes part, so that nothing but the noise differs.
        dp = DpPlan(noise_multiplier=1.0, sample_rate=1.0, clip=1.0, **key)
        train(model, cases, study, PRIVATE, replace(PLAN, dp=dp))
        return tensors.digest(get_weights(model))

    assert digest() != digest()
    assert digest(key=KEY) == digest(key=KEY)
    assert b"key" not in repr(DpPlan(1.0, 0.5, 1.0, key=KEY)).encode()


def test_poisson_batches_take_each_case_on_its_own() -> None:
    batches = list(islice(poisson_batches(NAMES, 0.1, KEY), 2000))
    sizes = np.array([len(b) for b in batches])
    assert sizes.mean() == pytest.approx(5, rel=0.05)
    assert sizes.var() == pytest.approx(50 * 0.1 * 0.9, rel=0.15)
    counts = np.bincount(np.concatenate(batches), minlength=50)
    assert abs(counts - 200).max() < 5 * 200**0.5


def test_penalty_and_correction_are_added_to_the_noisy_mean(make_study, make_cases) -> None:
    study = make_study(features=2, learning_rate=0.1, batch_size=2)
    cases = make_cases(np.zeros((2, 2), np.float32), np.array([0, 1]))
    plan = replace(
        PLAN,
        penalty=lambda local, start: 4 * local["1.weight"].sum(),
        correction={"1.weight": torch.tensor([[1.0, 2.0]])},
    )
    model = build_model(study, PRIVATE, n_features=2, seed=0)
    train(model, cases, study, PRIVATE, plan)
    assert get_weights(model)["1.weight"][0] == pytest.approx([-0.5, -0.6])


def test_one_key_gives_the_same_bits_whatever_the_seed(make_study, make_cases) -> None:
    study = make_study("cnn", options={"dropout": 0.5}, batch_size=4, augment=[{"name": "affine"}])
    cases = make_cases(study=study, n=8)

    def digest(seed: int, key: bytes) -> str:
        dp = DpPlan(noise_multiplier=1.0, sample_rate=0.5, clip=1.0, key=key)
        model = build_model(study, PRIVATE, seed=0)
        outcome = train(model, cases, study, PRIVATE, replace(PLAN, seed=seed, dp=dp))
        assert outcome.steps == 2
        return tensors.digest(get_weights(model))

    assert digest(1, KEY) == digest(1, KEY) == digest(2, KEY) != digest(1, bytes(31) + b"1")


def test_a_model_with_batch_norm_is_refused(make_study, make_cases) -> None:
    study = make_study("cnn", options={"norm": "batch"})
    model = build_model(study, Shared(), seed=0)
    with pytest.raises(ConfigError, match="batch norm"):
        train(model, make_cases(study=study), study, Shared(), PLAN)


def test_frozen_layers_get_neither_gradient_nor_noise(make_study, make_cases) -> None:
    study = make_study("cnn", more_model={"freeze": ["0."]})
    model = build_model(study, PRIVATE, seed=0)
    before = get_weights(model)
    dp = DpPlan(noise_multiplier=1.0, sample_rate=1.0, clip=1.0)
    train(model, make_cases(study=study), study, PRIVATE, replace(PLAN, dp=dp))
    after = get_weights(model)
    same = {n for n in before if np.array_equal(before[n], after[n])}
    assert same == {"0.weight", "0.bias"}
