"""Neighbours: with or without one patient, a step's sum differs by one clipped contribution.

Without noise, so that what one patient moves is seen as it is. Everything random is on: dropout,
augmentation, patches. The draws of everybody else must be the same, whoever is there.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfl.client.training.augment import AUGMENTATIONS
from medfl.client.training.caseset import CaseSet
from medfl.client.training.draws import OfEach, OutsideRandomnessError, names_of
from medfl.client.training.dropout import Dropouts
from medfl.client.training.loop import train
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.client.training.units import poisson_batches
from medfl.common.models import DP_MODELS, MODELS, build_model
from medfl.common.models.weights import get_weights
from medfl.common.noise import fresh_key, key_from, words_by_name
from medfl.common.statistics import Shared
from medfl.common.study import Study

PRIVATE = Shared(private=True)
CLIP = 0.1
SILENT = DpPlan(0.0, 1.0, CLIP, n_declared=1, key=key_from(1))
# The first patient's leaving moves everybody else's place in the batch.
PATIENTS = "aabccde"
SIDE = {"densenet": 32, "densenet121": 32, "basic_unet": 32}


def study_for(make_study: Any, name: str, **training: Any) -> Study:
    """The model on small images, with all the randomness that training has."""
    side, segments = SIDE.get(name, 16), MODELS[name].output == "masks"
    options = (
        {"dropout": 0.5} if "dropout" in inspect.signature(MODELS[name].build).parameters else {}
    )
    if name == "unet":
        options |= {"channels": [4, 8, 8]}
    return make_study(
        name,
        [side, side],
        kind="segmentation" if segments else "classification",
        classes=3 if segments else 2,
        loss="dice_ce" if segments else "cross_entropy",
        image={"fit": "keep"} if segments else None,
        options=options or None,
        **{"batch_size": 4, "local_steps": 1, "learning_rate": 1.0, **training},
    )


def cases_for(study: Study, n: int = len(PATIENTS)) -> CaseSet:
    """Random cases; for segmentation larger than a patch, and of several sizes."""
    rng = np.random.default_rng(3)
    side, names = study.image.size[0], tuple(f"case {i}" for i in range(n))
    patients = tuple((PATIENTS * n)[:n])
    if study.task.kind != "segmentation":
        inputs = rng.normal(size=(n, 1, side, side)).astype(np.float32)
        return CaseSet(inputs, rng.integers(0, 2, n), patients, names)
    sizes = [(side + 3 + i, side + 8 - i) for i in range(n)]
    images = [rng.normal(size=(1, *size)).astype(np.float32) for size in sizes]
    masks = [rng.integers(0, 3, size).astype(np.uint8) for size in sizes]
    return CaseSet(images, masks, patients, names)


def without(cases: CaseSet, patient: str) -> CaseSet:
    kept = [i for i, p in enumerate(cases.patients) if p != patient]

    def of(rows: Any) -> Any:
        return rows[kept] if isinstance(rows, np.ndarray) else [rows[i] for i in kept]

    names = (tuple(n[i] for i in kept) for n in (cases.patients, cases.keys))
    return CaseSet(of(cases.inputs), of(cases.targets), *names)


def summed(study: Study, cases: CaseSet, dp: DpPlan = SILENT, seed: int = 3) -> np.ndarray:
    """A step's sum of clipped contributions: what it takes off the weights at rate 1."""
    model = build_model(study, PRIVATE, seed=0)
    before = get_weights(model)
    train(model, cases, study, PRIVATE, TrainPlan(1, 1, seed=seed, dp=dp))
    after = get_weights(model)
    return np.concatenate([(before[n].astype(float) - after[n]).ravel() for n in before])


def moved(study: Study, patient: str, **more: Any) -> float:
    """How many clipping bounds lie between the sums with and without a patient."""
    cases = cases_for(study)
    change = summed(study, cases, **more) - summed(study, without(cases, patient), **more)
    return float(np.linalg.norm(change)) / CLIP


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("resnet34", "resnet50") else [])
        for n in DP_MODELS
    ],
)
@pytest.mark.parametrize("augment", [False, True])
def test_one_patient_moves_every_models_sum_by_at_most_one_clip(name, augment, make_study) -> None:
    changes = ["flip", "affine", "gaussian_noise"] if augment else []
    study = study_for(make_study, name, augment=[{"name": c, "probability": 0.7} for c in changes])
    for patient in "ac":
        # Nobody's gradient is shorter than the bound here, so a whole clip is what one moves.
        assert 0.9 < moved(study, patient) <= 1 + 1e-3


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("model", ["cnn", "unet"])
def test_one_patient_moves_no_more_under_any_augmentation(name, model, make_study) -> None:
    study = study_for(make_study, model, augment=[{"name": name, "probability": 0.7}])
    assert moved(study, "a") <= 1 + 1e-3


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_nor_where_who_takes_part_is_drawn_and_chunks_are_one_record(
    unit, make_study, monkeypatch
) -> None:
    from medfl.client.training import private

    study = study_for(make_study, "unet", batch_size=2, augment=[{"name": "elastic"}])
    monkeypatch.setattr(private, "MOST_NUMBERS", 1)
    for key in range(4):
        dp = replace(SILENT, sample_rate=0.5, n_declared=2, unit=unit, key=key_from(key))
        # Patient b has one record, so that one unit leaves, whichever is one.
        assert moved(study, "b", dp=dp) <= 1 + 1e-3


def test_the_reference_engine_draws_as_the_other_one(make_study, monkeypatch) -> None:
    from medfl.client.training import private
    from medfl.client.training.engines.materialised import Materialised, per_record_gradients

    def reference(model: nn.Module, loss_of: Any, dropouts: Dropouts) -> Materialised:
        return Materialised(
            dict(model.named_parameters()), per_record_gradients(model, loss_of, dropouts)
        )

    study = study_for(make_study, "unet", augment=[{"name": "affine"}])
    usual = summed(study, cases_for(study))
    monkeypatch.setattr(private, "engine_for", reference)
    np.testing.assert_allclose(summed(study, cases_for(study)), usual, atol=1e-5)
    assert moved(study, "a") <= 1 + 1e-3


def test_whoever_leaves_changes_nobodys_lot() -> None:
    names = [f"patient {i}" for i in range(200)]
    all_, fewer = (islice(poisson_batches(n, 0.3, key_from(2)), 20) for n in (names, names[1:]))
    for with_, without_ in zip(all_, fewer, strict=True):
        assert [i for i in with_ if i > 0] == [i + 1 for i in without_]


def test_two_hospitals_with_one_seed_draw_differently(make_study) -> None:
    # All take part and there is no noise: what differs is dropout, augmentation and patches.
    for more in ({}, {"augment": [{"name": "affine", "probability": 1.0}]}):
        study = study_for(make_study, "unet", **more)
        one, other = (
            summed(study, cases_for(study), replace(SILENT, key=fresh_key())) for _ in range(2)
        )
        assert np.linalg.norm(one - other) > 0.1 * CLIP
    assert np.array_equal(summed(study, cases_for(study)), summed(study, cases_for(study), seed=9))


def test_words_of_a_name_are_the_ciphers_blocks_of_it() -> None:
    # Each row is of its own name and purpose alone; 5 words take two blocks.
    names = names_of(["anna", "bea", "carl"])
    words = words_by_name(bytes(32), "x", names, 5)
    assert words.shape == (3, 5)
    np.testing.assert_array_equal(words_by_name(bytes(32), "x", names[1:], 5), words[1:])
    for other in (
        words_by_name(bytes(32), "y", names, 5),
        words_by_name(bytes(31) + b"1", "x", names, 5),
    ):
        assert not (other == words).any()
    bits = np.unpackbits(words_by_name(bytes(32), "x", names, 40_000).view(np.uint8))
    assert bits.mean() == pytest.approx(0.5, abs=4 * 0.5 / bits.size**0.5)


def test_dropout_keeps_the_promised_share_of_each_records_own_numbers() -> None:
    each = OfEach(bytes(32), [str(i) for i in range(6)])
    layer = nn.Sequential(nn.Dropout(0.25)).train()
    each.batch = np.arange(6)
    with Dropouts(each).replaced(layer):
        whole = layer(torch.ones(6, 4000))
        each.batch = np.arange(3, 6)
        assert torch.equal(layer(torch.ones(3, 4000)), whole[3:])
        assert torch.equal(layer.eval()(torch.ones(3, 8)), torch.ones(3, 8))
    assert whole.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((whole > 0).float().mean()) == pytest.approx(0.75, abs=0.015)
    assert float(layer.train()(torch.ones(3, 4000)).mean()) == pytest.approx(1, abs=0.05)


class Jittered(nn.Module):
    """Draws outside of a dropout layer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + torch.randn_like(x))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Jittered(), "outside of its dropout layers"),
        (nn.Sequential(nn.AlphaDropout(0.5), nn.Linear(4, 2)), "AlphaDropout"),
    ],
)
def test_a_model_that_draws_elsewhere_is_refused(model, what, make_study, make_cases) -> None:
    study = make_study(features=4, batch_size=2)
    cases = make_cases(np.ones((3, 4), np.float32), np.array([0, 1, 0]))
    with pytest.raises(OutsideRandomnessError, match=what):
        train(model, cases, study, PRIVATE, TrainPlan(1, 1, seed=1, dp=SILENT))
