"""From a cohort to the numbers of one part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client import encoding
from medfl.client.data.cases import Case, Cohort
from medfl.client.encoding import case_set, local_statistics
from medfl.client.hospital import Hospital
from medfl.common.statistics import Moments, Shared, merge
from medfl.common.study import ImageInput, Study

MakeStudy = Callable[..., Study]
MakeHospital = Callable[..., Hospital]
PARTS = ("train", "test", "train", "validation")


@pytest.fixture
def planes(risk_study: MakeStudy) -> Study:
    base = risk_study()
    image = ImageInput(dimensions=2, size=[1, 2], channels=2, intensity="federated")
    return replace(base, task=replace(base.task, kind="classification"), record=None, image=image)


def cohort_of(inputs: Any, targets: Any, parts: Any = PARTS) -> Cohort:
    cases = tuple(Case(f"k{i}", f"p{i}", part) for i, part in enumerate(parts))
    return Cohort(cases, inputs, targets)


def two_channels(n: int) -> Any:
    """Case i: channel 0 is (i, i + 2), channel 1 is (10 i, 10 i)."""
    return np.array([[[[i, i + 2]], [[10 * i, 10 * i]]] for i in range(n)], dtype=np.float32)


def test_only_training_cases_are_counted(
    risk_study: MakeStudy, tmp_path: Path, risk_hospital: MakeHospital
) -> None:
    study = risk_study(record={"scale": "federated"})
    cohort = risk_hospital(study, tmp_path, [1, 100, -4, 200], [0, 1, 1, 0], PARTS).cohort
    found = local_statistics(study, cohort, private=False)
    assert found.features == {"x": Moments(2, -3, 17)}
    assert found.n_cases == 2
    assert found.class_counts == ()


def test_class_counts_are_sent_only_where_the_loss_needs_them(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(training={"loss": "weighted_cross_entropy"})
    cohort = risk_hospital(study, tmp_path, [1, 2, 3, 4], [1, 0, 1, 0], PARTS).cohort
    assert local_statistics(study, cohort, private=False).class_counts == (0.0, 2.0)


def test_intensities_are_summed_by_channel(planes: Study) -> None:
    found = local_statistics(planes, cohort_of(two_channels(4), np.zeros(4)), private=False)
    # Training cases 0 and 2: channel 0 holds 0 2 2 4, channel 1 holds 0 0 20 20.
    assert found.intensity == (Moments(4, 8, 24), Moments(4, 40, 800))


def test_federated_intensities_are_scaled_by_the_shared_mean(planes: Study) -> None:
    shared = Shared(channel_means=(2.0, 10.0), channel_sds=(2.0, 5.0))
    cohort = cohort_of(two_channels(4), np.zeros(4))
    cases = case_set(planes, shared, cohort, "train")
    assert np.asarray(cases.inputs).tolist() == [
        [[[-1.0, 0.0]], [[-2.0, -2.0]]],
        [[[0.0, 1.0]], [[2.0, 2.0]]],
    ]
    assert cases.keys == ("k0", "k2")
    assert cases.patients == ("p0", "p2")


def test_a_part_that_does_not_fit_in_memory_is_read_case_by_case(
    planes: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = merge(
        [local_statistics(planes, cohort_of(two_channels(4), np.zeros(4)), private=False)]
    )
    cohort = cohort_of(two_channels(4), np.zeros(4))
    whole = case_set(planes, shared, cohort, "train").inputs
    monkeypatch.setattr(encoding, "IN_MEMORY_BYTES", 8)
    lazy = case_set(planes, shared, cohort, "train").inputs
    assert isinstance(whole, np.ndarray)
    assert not isinstance(lazy, np.ndarray)
    assert all(np.array_equal(lazy[i], whole[i]) for i in range(2))
    with pytest.raises(IndexError):
        lazy[2]


def test_images_of_several_sizes_stay_apart(risk_study: MakeStudy) -> None:
    base = risk_study()
    image = ImageInput(dimensions=2, size=[2, 2], fit="keep", intensity="none")
    study = replace(base, task=replace(base.task, kind="segmentation"), record=None, image=image)
    inputs = [np.zeros((1, 2 + i, 3), dtype=np.float32) for i in range(4)]
    masks = [np.full((2 + i, 3), i, dtype=np.uint8) for i in range(4)]
    cases = case_set(study, Shared(), cohort_of(inputs, masks), "train")
    assert [a.shape for a in cases.inputs] == [(1, 2, 3), (1, 4, 3)]
    assert [int(np.asarray(t).max()) for t in cases.targets] == [0, 2]


def test_a_part_without_cases_is_empty(planes: Study) -> None:
    cohort = cohort_of(two_channels(2), np.zeros(2), ("train", "train"))
    assert (
        len(case_set(planes, Shared(channel_means=(0,) * 2, channel_sds=(1,) * 2), cohort, "test"))
        == 0
    )


def test_site_scaling_uses_this_sites_training_records(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(record={"scale": "site"})
    cohort = risk_hospital(study, tmp_path, [2, 100, 6, 8], [0, 1, 1, 0], PARTS).cohort
    # Training records 2 and 6: mean 4, sd sqrt(8). The others' numbers are not looked at.
    test = case_set(study, Shared(), cohort, "test").inputs
    assert test[0][0] == pytest.approx((100 - 4) / 8**0.5)


def test_a_rare_level_in_a_test_record_keeps_nobody_out(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(
        record={"features": [{"name": "x", "kind": "category"}], "scale": "federated"}
    )
    cohort = risk_hospital(study, tmp_path, ["a", "rare", "b", "a"], [0, 1, 1, 0], PARTS).cohort
    shared = merge([local_statistics(study, cohort, private=False)])
    assert shared.levels == {"x": ("a", "b")}
    assert case_set(study, shared, cohort, "test").inputs[0].tolist() == [0.0]
