"""Predictions: probabilities, label maps, windows over large images."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from torch import nn

from medfl.client.training.predict import predict
from medfl.common.models import build_model
from medfl.common.models.weights import set_weights
from medfl.common.statistics import Shared

SHARED = Shared()


def test_one_logit_becomes_the_probability_of_the_second_class(make_study, make_cases) -> None:
    study = make_study(features=2, batch_size=2)
    model = build_model(study, SHARED, n_features=2, seed=0)
    set_weights(
        model,
        {"1.weight": np.array([[1, 0]], np.float32), "1.bias": np.array([log(3)], np.float32)},
    )
    cases = make_cases(np.array([[0, 9], [100, 0], [-100, 0]], np.float32), np.array([0, 1, 1]))
    batches = list(predict(model, cases, study, "cpu"))
    assert [b.shape for b in batches] == [(2, 1), (1, 1)]
    assert np.concatenate(batches).flatten() == pytest.approx([0.75, 1, 0])


def test_classes_sum_to_one_and_labels_do_not(make_study, make_cases) -> None:
    three = make_study("cnn", classes=3)
    found = next(iter(predict_all(three, make_cases)))
    assert found.shape == (4, 3)
    assert found.sum(axis=1) == pytest.approx(np.ones(4))
    labels = make_study("cnn", classes=3, multi_label=True)
    assert not np.allclose(next(iter(predict_all(labels, make_cases))).sum(axis=1), 1)


def predict_all(study, make_cases):
    return predict(build_model(study, SHARED, seed=0), make_cases(study=study), study, "cpu")


def test_the_model_predicts_in_evaluation_mode_and_returns_to_training(
    make_study, make_cases
) -> None:
    study = make_study("cnn", options={"dropout": 0.9})
    model = build_model(study, SHARED, seed=0)
    cases = make_cases(study=study)
    first, second = (np.concatenate(list(predict(model, cases, study, "cpu"))) for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training
    assert all(torch.is_grad_enabled() for _ in predict(model, cases, study, "cpu"))


class Brightness(nn.Module):
    """Class 1 where the voxel is above 0.5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x, 0.5), x], dim=1)


@pytest.mark.parametrize("fit", ["pad_crop", "keep"])
def test_label_maps_have_the_size_of_their_image(fit, make_study, make_cases) -> None:
    study = make_study("unet", [16, 16], "segmentation", 2, image={"fit": fit}, batch_size=2)
    rng = np.random.default_rng(0)
    sizes = [(16, 16)] * 3 if fit == "pad_crop" else [(40, 23), (16, 16), (9, 50)]
    images = [rng.random((1, *s)).astype(np.float32) for s in sizes]
    masks = [(i[0] > 0.5).astype(np.uint8) for i in images]
    cases = make_cases(np.stack(images) if fit == "pad_crop" else images, masks)
    maps = [m for batch in predict(Brightness(), cases, study, "cpu") for m in batch]
    assert [m.dtype for m in maps] == [np.uint8] * 3
    for found, expected in zip(maps, masks, strict=True):
        assert np.array_equal(found, expected)
