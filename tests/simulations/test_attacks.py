"""Attacks succeed where nothing protects and fail where something does, or they show nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medfl.client.training.plan import DpPlan
from medfl.common import cli
from medfl.common.models import build_model
from medfl.common.noise import key_from
from medfl.common.statistics import Shared
from medfl.simulations.attacks import inversion, membership, poisoning
from medfl.simulations.attacks.__main__ import ATTACKS, app


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
def test_an_image_comes_back_out_of_its_update_unless_it_is_protected() -> None:
    found = inversion.run(seed=0, steps=200).found
    assert found.pop("no protection") > 0.7
    sums = [found.pop(what) for what in list(found) if what.startswith("sum of 5 sites")]
    assert len(sums) == 2
    assert max(sums) < 0.5
    assert found.keys() == {"ε = 8", "ε = 1"}
    assert max(found.values()) < 0.3


def test_clipping_without_noise_protects_nobody() -> None:
    model = build_model(inversion._study(), Shared(private=True), seed=1)
    truth = inversion.image(0, 0)
    silent = DpPlan(1e-6, 1.0, clip=1.0, n_declared=1, key=key_from(0))
    delta = inversion.update(model, truth[None], 0, silent)
    assert inversion.found_in(inversion.invert(model, delta, 0, steps=150), truth) > 0.6


def test_what_is_a_patients_own_is_the_whole_of_itself_and_nothing_of_others() -> None:
    one = inversion.image(5, 0)
    assert inversion.found_in(2 * one + 1e-3, one) == pytest.approx(1, abs=1e-2)
    others = [inversion.found_in(inversion.image(6, n), one) for n in range(30)]
    assert abs(np.mean(others)) < 0.1


@pytest.mark.slow
def test_the_loss_tells_who_was_trained_on_unless_training_was_private() -> None:
    bare = membership.attack(None, seed=0)
    strong = [membership.attack(1.0, seed=seed) for seed in range(8)]
    assert bare.interval[0] > 0.7
    # Epsilon 1 allows .73, so that the area need not be 1/2; these eight have .545 on average.
    assert 0.45 < np.mean([told.auc for told in strong]) < 0.6
    for told in strong:
        assert told.interval[1] < bare.interval[0]
        assert told.auc < membership.best_possible(1.0, membership.DELTA)
    # Noise that promises nothing protects nobody: the attack is not fooled by clipping.
    assert membership.attack(1000.0, seed=0).interval[0] > 0.6


def test_the_area_by_hand_and_the_best_that_epsilon_allows() -> None:
    assert membership.auc(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == (3 + 0.5) / 4
    assert membership.best_possible(0.0, 0.0) == pytest.approx(0.5, abs=1e-4)
    # With e^eps = 3 the lines meet at (1/4, 3/4): a triangle of 3/32 and a trapezium of 21/32.
    assert membership.best_possible(np.log(3), 0.0) == pytest.approx(0.75, abs=1e-4)
    false, true = membership.roc(membership.attack(None, seed=1))
    area = float(np.trapezoid(true, false))
    assert area == pytest.approx(membership.attack(None, seed=1).auc, abs=1e-9)


@pytest.mark.slow
def test_one_poisoned_site_of_five_breaks_the_mean_and_not_the_robust_rules() -> None:
    found = poisoning.run(seed=0, strategies=("fedavg", "median", "krum"))
    honest, poisoned = found.pop("fedavg")
    assert honest > 0.75
    assert poisoned < 0.5
    for robust_honest, robust_poisoned in found.values():
        assert robust_honest > 0.75
        assert robust_poisoned > honest - 0.05


@pytest.mark.slow
def test_the_command_writes_numbers_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(app, ["membership", "--out", str(tmp_path)], "attacks") == 0
    numbers = json.loads((tmp_path / "membership.json").read_text())
    assert numbers == json.loads(capsys.readouterr().out)
    assert set(numbers["found"]) == {"no protection", "ε = 8", "ε = 1"}
    figure = (tmp_path / "membership.svg").read_text()
    assert "Who was trained on?" in figure
    assert cli.run(app, ["telepathy", "--out", str(tmp_path)], "attacks") == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ATTACKS)
