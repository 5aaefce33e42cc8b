"""Losses against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from medfl.common.errors import ConfigError
from medfl.common.losses import LOSSES, build_loss, class_weights
from medfl.common.statistics import Shared

SHARED = Shared()
# Softmax of these: 1/4 and 3/4; sigmoid of log 3: 3/4.
QUARTERS = torch.tensor([[0.0, log(3.0)]])


def test_one_logit_is_the_log_odds_of_the_second_class(make_study) -> None:
    loss = build_loss(make_study(), SHARED)
    logits = torch.full((2, 1), log(3.0))
    both = loss(logits, torch.tensor([1, 0]))
    assert float(both) == pytest.approx((log(4 / 3) + log(4)) / 2)


def test_several_classes_and_several_labels(make_study) -> None:
    classes = build_loss(make_study(classes=3), SHARED)
    assert float(classes(torch.zeros(2, 3), torch.tensor([0, 2]))) == pytest.approx(log(3))
    labels = build_loss(make_study(classes=2, multi_label=True), SHARED)
    value = labels(QUARTERS, torch.tensor([[1.0, 1.0]]))
    assert float(value) == pytest.approx((log(2) + log(4 / 3)) / 2)


def test_masks_average_over_their_voxels(make_study) -> None:
    study = make_study("unet", [16, 16], "segmentation", 2)
    logits = QUARTERS.reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    masks = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    value = build_loss(study, SHARED)(logits, masks)
    assert float(value) == pytest.approx((log(4) + log(4 / 3)) / 2)


def test_missing_class_weights_come_from_the_shared_counts(make_study) -> None:
    study = make_study(loss="weighted_cross_entropy")
    assert class_weights(study, Shared(class_counts=(30, 10))) == pytest.approx((2 / 3, 2))
    # 30 · 2/3 + 10 · 2 = 40: the mean over cases is 1, so the learning rate keeps its meaning.
    with pytest.raises(ConfigError, match=r"training.class_weights: is missing"):
        build_loss(study, SHARED)
    own = make_study(loss="weighted_cross_entropy", class_weights=[1, 5])
    assert class_weights(own, Shared(class_counts=(30, 10))) == (1, 5)


def test_a_weight_multiplies_its_class_and_no_other_record(make_study) -> None:
    loss = build_loss(make_study(loss="weighted_cross_entropy", class_weights=[1, 5]), SHARED)
    logits = torch.full((2, 1), log(3.0))
    value = loss(logits, torch.tensor([1, 0]))
    assert float(value) == pytest.approx((5 * log(4 / 3) + log(4)) / 2)


def test_focal_loss_cares_less_for_what_is_already_right(make_study) -> None:
    loss = build_loss(make_study(loss="focal", focal_gamma=2), SHARED)
    sure = loss(torch.tensor([[log(3.0)]]), torch.tensor([1]))
    assert float(sure) == pytest.approx(0.25**2 * log(4 / 3))
    without = build_loss(make_study(loss="focal", focal_gamma=0), SHARED)
    assert float(without(torch.tensor([[log(3.0)]]), torch.tensor([1]))) == pytest.approx(
        log(4 / 3)
    )


def test_focal_gradient_is_finite_where_the_answer_is_certain(make_study) -> None:
    loss = build_loss(make_study(loss="focal", focal_gamma=0.5), SHARED)
    logits = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    loss(logits, torch.tensor([1, 1])).backward()
    assert torch.isfinite(logits.grad).all()


def test_dice_of_one_foreground_class_by_hand(make_study) -> None:
    study = make_study("unet", [16, 16], "segmentation", 2, loss="dice")
    # Two voxels with foreground shares 3/4 and 1/2; truth: the first only.
    logits = torch.tensor([[[[0.0, 0.0]], [[log(3.0), 0.0]]]])
    masks = torch.tensor([[[1, 0]]], dtype=torch.uint8)
    expected = 1 - (2 * 0.75 + 1) / (0.75 + 0.5 + 1 + 1)
    assert float(build_loss(study, SHARED)(logits, masks)) == pytest.approx(expected)
    both = make_study("unet", [16, 16], "segmentation", 2, loss="dice_ce")
    ce = (log(4 / 3) + log(2)) / 2
    assert float(build_loss(both, SHARED)(logits, masks)) == pytest.approx(expected + ce)


def test_dice_of_an_absent_class_is_right_when_nothing_is_predicted(make_study) -> None:
    study = make_study("unet", [16, 16], "segmentation", 2, loss="dice")
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 50
    empty = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert float(build_loss(study, SHARED)(logits, empty)) == pytest.approx(0, abs=1e-6)
    assert exp(-50) < 1e-20


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_records(name, make_study) -> None:
    study = make_study("unet", [16, 16], "segmentation", 3, loss=name)
    loss = build_loss(study, Shared(class_counts=(5, 3, 2)))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 6, generator=generator)
    masks = torch.randint(0, 3, (4, 5, 6), generator=generator).to(torch.uint8)
    alone = [float(loss(logits[i : i + 1], masks[i : i + 1])) for i in range(4)]
    assert float(loss(logits, masks)) == pytest.approx(sum(alone) / 4, rel=1e-5)
