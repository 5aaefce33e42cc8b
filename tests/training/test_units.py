"""Patients as the unit of privacy: one clipped contribution each, however many images they have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medfl.client.training import private
from medfl.client.training.caseset import CaseSet
from medfl.client.training.engines.engine import Bound
from medfl.client.training.engines.materialised import (
    Materialised,
    clipped_sum,
    per_record_gradients,
)
from medfl.client.training.loop import train
from medfl.client.training.plan import DpPlan, TrainPlan
from medfl.client.training.private import sum_of_units
from medfl.client.training.units import groups, mean_by_unit, units_of
from medfl.common.losses import build_loss
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.statistics import Shared

PRIVATE = Shared(private=True)
CLIP = 0.5
# What a patient may bring along: many images, huge gradients, none that are numbers.
SCALES = [1.0, 1e6, -1e6, 1e30, float("nan"), float("inf")]


def cases_of(patients: str, n_features: int = 3, seed: int = 0) -> CaseSet:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(len(patients), n_features)).astype(np.float32)
    keys = tuple(f"{i:04x}" for i in range(len(patients)))
    return CaseSet(inputs, rng.integers(0, 2, len(patients)), tuple(patients), keys)


def summed(cases: CaseSet, patients: list[str], at_once: int = 64) -> np.ndarray:
    """The sum of these patients' contributions before noise, where a record is its own gradient."""

    def fetch(positions):
        return torch.from_numpy(cases.inputs[positions]), torch.from_numpy(cases.targets[positions])

    units = [u for u in units_of(cases, "patient") if cases.patients[u[0]] in patients]
    weights = {"w": torch.nn.Parameter(torch.zeros(3))}
    engine = Materialised(weights, lambda _, x, y: {"w": x})
    total = sum_of_units(units, at_once, weights, engine, fetch, Bound(CLIP))
    return total["w"].double().numpy()


def test_records_of_one_patient_are_one_unit_wherever_they_stand() -> None:
    units = units_of(cases_of("abacb"), "patient")
    assert [list(u) for u in units] == [[0, 2], [1, 4], [3]]
    assert [list(u) for u in units_of(cases_of("aab"), "record")] == [[0], [1], [2]]


def test_a_contribution_is_the_mean_of_the_patients_gradients() -> None:
    gradients = {"w": torch.tensor([[1.0, 0.0], [3.0, 2.0], [-5.0, 1.0]])}
    assert mean_by_unit(gradients, [2, 1])["w"].tolist() == [[2.0, 1.0], [-5.0, 1.0]]


def test_groups_hold_whole_patients_and_no_more_records_than_fit() -> None:
    units = units_of(cases_of("aabbbcdddddde"), "patient")
    assert [[len(u) for u in g] for g in groups(units, 4)] == [[2], [3, 1], [6], [1]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n_images", [1, 50])
@pytest.mark.parametrize("at_once", [64, 7])
def test_a_patient_moves_the_sum_by_at_most_the_bound(
    n_images: int, scale: float, at_once: int
) -> None:
    # Rest of the hospital: 5 patients, one of them with 3 images. x is the patient in question.
    cases = cases_of("abcdeee" + "x" * n_images)
    cases.inputs[7:] *= scale
    rest = summed(cases, list("abcde"), at_once)
    moved = summed(cases, list("abcdex"), at_once) - rest
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= CLIP * (1 + 1e-5)
    if scale == 1e6:
        # The bound is reached, so it could not be smaller than it says.
        assert np.linalg.norm(moved) == pytest.approx(CLIP, rel=1e-4)


def test_one_broken_image_costs_its_patient_and_nobody_else() -> None:
    cases = cases_of("aabb")
    cases.inputs[1] = np.nan
    both = summed(cases, ["a", "b"])
    np.testing.assert_array_equal(both, summed(cases, ["b"]))


def test_fifty_copies_of_an_image_count_as_one() -> None:
    cases = cases_of("abbbbbbbbbb")
    cases.inputs[1:], cases.targets[1:] = cases.inputs[0], cases.targets[0]
    once, ten = summed(cases, ["a"]), summed(cases, ["b"])
    np.testing.assert_allclose(ten, once, rtol=1e-5)
    np.testing.assert_allclose(summed(cases, ["b"], at_once=3), once, rtol=1e-5)


def test_patients_with_one_record_each_are_records_to_the_last_bit(make_study) -> None:
    study = make_study(features=3, batch_size=8, local_steps=5)
    cases = cases_of("abcdefghijkl")
    # Who takes part follows from the unit's name, so that both must have one.
    cases = replace(cases, keys=cases.patients)
    found = []
    for unit in ("patient", "record"):
        dp = DpPlan(1.0, 0.5, CLIP, unit=unit, key=bytes(32))
        model = build_model(study, PRIVATE, n_features=3, seed=0)
        train(model, cases, study, PRIVATE, TrainPlan(round=1, rounds=1, seed=3, dp=dp))
        found.append(get_weights(model))
    for name, array in found[0].items():
        assert array.tobytes() == found[1][name].tobytes()


def test_the_step_draws_patients_and_not_their_images(make_study) -> None:
    # Without noise, at rate 1: 4 patients with 1 to 4 images; the sum is divided by 4, not by 10.
    study = make_study(features=3, batch_size=4, learning_rate=1.0, local_steps=1)
    cases = cases_of("abbcccdddd")
    dp = DpPlan(0.0, 1.0, CLIP, key=bytes(32))
    model = build_model(study, PRIVATE, n_features=3, seed=0)
    train(model, cases, study, PRIVATE, TrainPlan(round=1, rounds=1, seed=3, dp=dp))
    means = []
    start = build_model(study, PRIVATE, n_features=3, seed=0)
    gradients_of = per_record_gradients(start, build_loss(study, PRIVATE))
    values = {n: p.detach() for n, p in start.named_parameters()}
    each = gradients_of(values, torch.from_numpy(cases.inputs), torch.from_numpy(cases.targets))
    for rows in ([0], [1, 2], [3, 4, 5], [6, 7, 8, 9]):
        means.append({n: g[rows].mean(dim=0, keepdim=True) for n, g in each.items()})
    total = {n: sum(clipped_sum(m, Bound(CLIP))[n] for m in means) for n in values}
    for name, weight in get_weights(model).items():
        np.testing.assert_allclose(weight, -total[name].numpy() / 4, atol=1e-6)


def test_a_patient_with_more_images_than_fit_is_read_in_parts(make_study, monkeypatch) -> None:
    study = make_study(features=3, batch_size=4, local_steps=1)
    cases = cases_of("aaaaaaaaabb")
    found = []
    for most in (private.MOST_NUMBERS, 1):
        monkeypatch.setattr(private, "MOST_NUMBERS", most)
        model = build_model(study, PRIVATE, n_features=3, seed=0)
        dp = replace(DpPlan(0.0, 1.0, CLIP), key=bytes(32))
        train(model, cases, study, PRIVATE, TrainPlan(round=1, rounds=1, seed=3, dp=dp))
        found.append(get_weights(model)["1.weight"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
