"""Local training: one step by hand, hooks of strategies, schedules, determinism."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from medfl.client.training.batches import pad_to, random_patch, shuffled_batches
from medfl.client.training.loop import steps_in_round, train
from medfl.client.training.plan import TrainPlan
from medfl.client.training.schedule import (
    learning_rate_at,
    private_steps_in_round,
    sample_rate_for,
)
from medfl.common import tensors
from medfl.common.errors import DataError
from medfl.common.models import MODELS, build_model
from medfl.common.models.weights import get_weights
from medfl.common.statistics import Shared

SHARED = Shared()
PLAN = TrainPlan(round=1, rounds=1, seed=3)
# At zero weights every probability is 1/2, so the gradient is the mean of (1/2 - y) · x:
# ((-1/2)(1, 2) + (1/2)(3, -1)) / 2 = (0.5, -0.75), and 0 for the bias.
TWO = (np.array([[1, 2], [3, -1]], np.float32), np.array([1, 0]))


def logistic(study):
    return build_model(study, SHARED, n_features=2, seed=0)


def test_one_step_of_gradient_descent_by_hand(make_study, make_cases) -> None:
    study = make_study(features=2, learning_rate=0.1, batch_size=2)
    model = logistic(study)
    outcome = train(model, make_cases(*TWO), study, SHARED, PLAN)
    weights = get_weights(model)
    assert weights["1.weight"][0] == pytest.approx([-0.05, 0.075])
    assert weights["1.bias"][0] == pytest.approx(0)
    assert (outcome.steps, outcome.learning_rate) == (1, 0.1)
    assert outcome.loss == pytest.approx(math.log(2))


def test_the_penalty_pulls_back_to_the_weights_the_round_began_with(make_study, make_cases) -> None:
    study = make_study(features=2, learning_rate=0.1, batch_size=2, local_steps=2)
    mu = 0.5

    def proximal(local, start):
        return mu / 2 * sum(((local[n] - start[n]) ** 2).sum() for n in local)

    free, pulled, once = logistic(study), logistic(study), logistic(study)
    cases = make_cases(*TWO)
    train(
        once, cases, replace(study, training=replace(study.training, local_steps=1)), SHARED, PLAN
    )
    train(free, cases, study, SHARED, PLAN)
    train(pulled, cases, study, SHARED, replace(PLAN, penalty=proximal))
    # The first step is at the start, where the penalty is flat; the second adds mu · (w1 - w0).
    pull = -0.1 * mu * get_weights(once)["1.weight"]
    difference = get_weights(pulled)["1.weight"] - get_weights(free)["1.weight"]
    assert difference == pytest.approx(pull, abs=1e-7)


def test_the_correction_is_added_to_every_gradient_after_clipping(make_study, make_cases) -> None:
    study = make_study(features=2, learning_rate=0.1, batch_size=2, clip_gradient=0.1)
    correction = {"1.weight": torch.tensor([[1.0, -2.0]])}
    clipped, corrected = logistic(study), logistic(study)
    train(clipped, make_cases(*TWO), study, SHARED, PLAN)
    train(corrected, make_cases(*TWO), study, SHARED, replace(PLAN, correction=correction))
    moved = get_weights(clipped)["1.weight"]
    assert np.linalg.norm(moved) == pytest.approx(0.1 * 0.1, rel=1e-4)
    assert get_weights(corrected)["1.weight"] - moved == pytest.approx(np.array([[-0.1, 0.2]]))


def test_the_last_small_batch_counts(make_study, make_cases) -> None:
    study = make_study(features=2, batch_size=2, learning_rate=1e-9, local_epochs=3)
    cases = make_cases(study=study, n=5)
    outcome = train(logistic(study), cases, study, SHARED, PLAN)
    assert outcome.steps == steps_in_round(study, 5) == 9
    first = list(islice(shuffled_batches(5, 2, seed=1), 3))
    assert [len(b) for b in first] == [2, 2, 1]
    assert sorted(np.concatenate(first)) == [0, 1, 2, 3, 4]
    assert [len(b) for b in islice(shuffled_batches(5, 2, seed=1, at_least=2), 3)] == [2, 2, 2]


def test_steps_a_round_are_steps_or_epochs(make_study) -> None:
    assert steps_in_round(make_study(local_steps=7), 1000) == 7
    epochs = make_study(local_epochs=2, batch_size=32)
    assert steps_in_round(epochs, 96) == 6
    assert steps_in_round(epochs, 97) == 8
    assert sample_rate_for(epochs, 96) == pytest.approx(1 / 3)
    assert sample_rate_for(epochs, 3) == 1
    assert private_steps_in_round(epochs, 32 / 96) == 6
    assert private_steps_in_round(epochs, 0.3) == 8


def rate(make_study, progress, step=0.1, rounds=10, **keys):
    training = make_study(learning_rate=2.0, rounds=rounds, **keys).training
    return learning_rate_at(training, rounds, progress, step)


def test_schedules_by_hand(make_study) -> None:
    assert rate(make_study, 9.9) == 2
    assert rate(make_study, 5, schedule="linear") == pytest.approx(1)
    assert rate(make_study, 5, schedule="linear", final_fraction=0.5) == pytest.approx(1.5)
    assert rate(make_study, 0, schedule="cosine") == 2
    assert rate(make_study, 10 / 3, schedule="cosine") == pytest.approx(1.5)
    assert rate(make_study, 10, schedule="cosine", final_fraction=0.25) == pytest.approx(0.5)
    steps = [rate(make_study, p, schedule="step") for p in (4.9, 5, 7.4, 7.5)]
    assert steps == pytest.approx([2, 0.2, 0.2, 0.02])
    assert rate(make_study, 9, schedule="step", final_fraction=0.3) == pytest.approx(0.6)


def test_warm_up_reaches_the_full_rate_with_its_last_step(make_study) -> None:
    keys = {"warmup_rounds": 2, "schedule": "linear", "step": 0.5}
    rates = [rate(make_study, p, **keys) for p in (0, 0.5, 1, 1.5, 2, 6)]
    assert rates == pytest.approx([0.5, 1, 1.5, 2, 2, 1])


def test_the_rate_moves_within_a_round(make_study, make_cases) -> None:
    study = make_study(features=2, schedule="linear", learning_rate=1.0, local_steps=4)
    outcome = train(logistic(study), make_cases(*TWO), study, SHARED, replace(PLAN, rounds=2))
    # The four steps of round 1 of 2 begin after 0, 1/8, 2/8 and 3/8 of everything.
    assert outcome.learning_rate == pytest.approx(1 - (0 + 1 + 2 + 3) / 8 / 4)


AUGMENT = [{"name": "flip"}, {"name": "affine"}, {"name": "gaussian_noise"}]


def trained(study, cases, plan=PLAN):
    model = build_model(study, SHARED, seed=1)
    train(model, cases, study, SHARED, plan)
    return tensors.digest(get_weights(model))


def test_one_seed_gives_the_same_bits_and_leaves_torch_alone(make_study, make_cases) -> None:
    study = make_study("cnn", options={"dropout": 0.5}, augment=AUGMENT, batch_size=3)
    cases = make_cases(study=study, n=8)
    first = trained(study, cases)
    torch.rand(5), np.random.rand(5)
    before = torch.random.get_rng_state()
    assert trained(study, cases) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert trained(study, cases, replace(PLAN, seed=4)) != first


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_every_optimiser_lowers_the_loss(optimiser, make_study, make_cases) -> None:
    study = make_study(features=2, optimiser=optimiser, learning_rate=0.05, local_epochs=30)
    model, cases = logistic(study), make_cases(*TWO)
    first = train(model, cases, study, SHARED, PLAN).loss
    assert train(model, cases, study, SHARED, PLAN).loss < first < math.log(2)


def test_adam_takes_its_first_step_of_one_learning_rate(make_study, make_cases) -> None:
    study = make_study(features=2, optimiser="adam", learning_rate=0.05)
    model = logistic(study)
    train(model, make_cases(*TWO), study, SHARED, PLAN)
    assert get_weights(model)["1.weight"][0] == pytest.approx([-0.05, 0.05], rel=1e-4)


def test_a_loss_that_is_not_a_number_says_what_to_do(make_study, make_cases) -> None:
    study = make_study(features=2)
    bad = make_cases(np.array([[np.inf, -np.inf]], np.float32), np.array([1]))
    with pytest.raises(DataError, match="learning_rate"):
        train(logistic(study), bad, study, SHARED, PLAN)
    with pytest.raises(DataError, match="no training cases"):
        train(logistic(study), make_cases(TWO[0][:0], TWO[1][:0]), study, SHARED, PLAN)


def test_frozen_layers_keep_weights_and_running_statistics(make_study, make_cases) -> None:
    study = make_study(
        "cnn", options={"norm": "batch"}, more_model={"freeze": ["0.", "1."]}, batch_size=2
    )
    model = build_model(study, SHARED, seed=0)
    before = get_weights(model)
    train(model, make_cases(study=study, n=5), study, SHARED, PLAN)
    after = get_weights(model)
    same = {n for n in before if np.array_equal(before[n], after[n])}
    # Batch norm takes the mean away, so that a bias before it has the gradient 0, but for rounding.
    without_gradient = {"4.bias", "8.bias"}
    assert same - without_gradient == {n for n in before if n.startswith(("0.", "1."))}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_its_only_case(name, make_study, make_cases) -> None:
    segments = MODELS[name].output == "masks"
    side = 32 if name.startswith(("densenet", "basic")) else 16
    study = make_study(
        name,
        [side, side],
        kind="segmentation" if segments else "classification",
        classes=3 if segments else 2,
        loss="dice_ce" if segments else "cross_entropy",
        learning_rate=0.003,
        local_steps=3,
    )
    model = build_model(study, SHARED, seed=0)
    cases = make_cases(study=study, n=1)
    first = train(model, cases, study, SHARED, PLAN).loss
    assert train(model, cases, study, SHARED, PLAN).loss < first


def test_half_of_the_patches_look_for_foreground() -> None:
    image = np.arange(40 * 40, dtype=np.float32).reshape(1, 40, 40)
    mask = np.zeros((40, 40), np.uint8)
    mask[1, 1] = 1
    rng = np.random.default_rng(0)
    pairs = [random_patch(image, mask, (8, 8), rng) for _ in range(400)]
    assert all(p[0].shape == (1, 8, 8) and p[1].shape == (8, 8) for p in pairs)
    hits = sum(bool(p[1].any()) for p in pairs) / 400
    assert 0.4 < hits < 0.6
    for patch, labels in pairs:
        assert set(patch[0][labels == 1]) <= {41.0}


def test_images_smaller_than_the_patch_are_padded_by_their_darkest_value() -> None:
    padded = pad_to(np.array([[[5, 7]]], np.float32), (2, 4))
    assert padded[0].tolist() == [[5, 5, 7, 5], [5, 5, 5, 5]]
    image, mask = random_patch(
        np.full((1, 2, 2), 9, np.float32),
        np.ones((2, 2), np.uint8),
        (4, 4),
        np.random.default_rng(0),
    )
    assert image.min() == 9
    assert mask.sum() == 4


def test_images_of_their_own_size_train_by_patches(make_study, make_cases) -> None:
    study = make_study(
        "unet", [16, 16], "segmentation", 2, image={"fit": "keep"}, batch_size=2, augment=AUGMENT
    )
    rng = np.random.default_rng(0)
    sizes = [(20, 33), (9, 40), (16, 16)]
    images = [rng.normal(size=(1, *s)).astype(np.float32) for s in sizes]
    masks = [rng.integers(0, 2, s).astype(np.uint8) for s in sizes]
    cases = make_cases(images, masks)
    assert trained(study, cases) == trained(study, cases)
