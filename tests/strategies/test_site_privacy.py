"""Whole hospitals under differential privacy: bounded parts, the promised noise, honest epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from medfl.common import accounting, config
from medfl.common.errors import ConfigError
from medfl.common.messages import Reply
from medfl.common.noise import Keystream, key_from
from medfl.common.study import SiteLevelPrivacy, Study
from medfl.server.rounds import Outcome
from medfl.strategies.catalogue import STRATEGIES, WEIGHTINGS, strategy_for
from medfl.strategies.site_privacy import noise_multiplier, noised_mean, shortened, spent

EQUAL = WEIGHTINGS["equal"]
FIT = ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]


def study(
    site_privacy: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **federation: Any,
) -> Study:
    plain = {
        "name": "s",
        "task": {"kind": "risk", "classes": ["no", "yes"]},
        "record": {"features": [{"name": "x"}], "scale": "none"},
        "model": {"name": "logistic", **(model or {})},
        "training": {"local_steps": 1},
        "federation": {"rounds": 4, "weighting": "equal", **federation},
        "site_privacy": {"epsilon": 2.0, "delta": 1e-3, "sites": 4, **(site_privacy or {})},
    }
    return config.parse(plain, Study, "study")


def updates(*rows: Iterable[float], cases: int = 1) -> list[Reply]:
    """One a hospital: the first number is parameter `a`, the others are `b`."""
    made = [np.asarray(row, dtype=np.float32) for row in rows]
    return [
        Reply(site=str(i), n_cases=cases + i, delta={"a": row[:1], "b": row[1:]})
        for i, row in enumerate(made)
    ]


def of(combine: Callable[..., Any], *rows: Iterable[float]) -> np.ndarray:
    delta = combine(updates(*rows), EQUAL).delta
    return np.concatenate([delta["a"], delta["b"]])


def silent(n: int) -> np.ndarray:
    return np.zeros(n)


def test_the_sum_by_hand_each_update_shortened_and_divided_by_the_declared_number() -> None:
    # (3, 4, 0) has length 5: clipped to 2.5, half of it. (0, -2, 0) stays. Four were declared.
    combine = noised_mean(study({"clip": 2.5}), silent)
    assert of(combine, [3, 4, 0], [0, -2, 0]).tolist() == [1.5 / 4, (2 - 2) / 4, 0]


def test_the_noise_is_sigma_times_the_bound_on_the_sum() -> None:
    private = study({"clip": 2.5})
    combine = noised_mean(private, lambda n: np.arange(1.0, n + 1))
    sd = 2.5 * noise_multiplier(private)
    # Noise of the parameters in the order of their names: a, then b.
    assert of(combine, [0, 0, 0]) == pytest.approx([sd / 4, sd / 4, 2 * sd / 4], rel=1e-6)


def spread(combine: Callable[..., Any], n: int = 20_000) -> float:
    """Standard deviation of what is added to the sum of nothing."""
    made = combine(updates(np.zeros(n)), EQUAL).delta
    return float(np.concatenate([made["a"], made["b"]]).astype(np.float64).std(ddof=1)) * 4


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.97])
def test_the_spread_of_the_noise_is_what_was_promised_and_half_of_it_is_noticed(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, n = study({"clip": 0.3}), 20_000
    whole = Keystream.normals
    monkeypatch.setattr(Keystream, "normals", lambda self, m: factor * whole(self, m))
    found = spread(strategy_for(private, key_from(7)).combine)
    promised = 0.3 * noise_multiplier(private)
    low, high = stats.chi2.ppf([0.0005, 0.9995], n - 1) / (n - 1)
    assert (low <= (found / promised) ** 2 <= high) == (factor == 1.0)


@pytest.mark.parametrize("evil", [1e30, math.inf, -math.inf, math.nan])
def test_no_hospital_moves_the_sum_by_more_than_the_bound(evil: float) -> None:
    combine = noised_mean(study({"clip": 2.0}), silent)
    others = [[1, 0, 0.5], [-0.5, 1, 0]]
    moved = 4 * (of(combine, *others, [evil, -3, 2]) - of(combine, *others))
    assert np.linalg.norm(moved) <= 2.0 * (1 + 1e-6)
    assert np.isfinite(moved).all()


def test_shortening_takes_all_parameters_together_and_never_lengthens() -> None:
    short = shortened({"a": np.array([0.6]), "b": np.array([[0.8]])}, 0.5)
    assert (float(short["a"][0]), float(short["b"][0, 0])) == pytest.approx((0.3, 0.4))
    assert float(shortened({"a": np.array([0.1])}, 0.5)["a"][0]) == 0.1


def test_cases_and_order_decide_nothing() -> None:
    combine = noised_mean(study(), silent)
    some = updates([1, 0, 0], [0, 0.5, 0], cases=7)
    one = combine(some, EQUAL).delta
    other = combine([replace(u, n_cases=1) for u in reversed(some)], EQUAL).delta
    assert all((one[name] == other[name]).all() for name in one)


def test_frozen_parameters_get_no_noise_and_no_update() -> None:
    combine = noised_mean(study(model={"freeze": ["b"]}), lambda n: np.ones(n))
    assert set(combine(updates([1, 5, 5]), EQUAL).delta) == {"a"}


def test_epsilon_is_the_accountants_and_reaches_what_was_asked_after_all_rounds() -> None:
    private = study({"epsilon": 2.0, "delta": 1e-3}, rounds=4)
    sigma = noise_multiplier(private)
    assert spent(private, 3) == accounting.epsilon([(sigma, 1.0, 3)], 1e-3)
    assert 1.98 <= spent(private, 4) <= 2.0
    # Four rounds are one Gaussian of sigma / 2 (Balle and Wang 2018).
    assert spent(private, 4) == pytest.approx(accounting.epsilon([(sigma / 2, 1.0, 1)], 1e-3))


def test_no_update_is_no_change_and_no_noise() -> None:
    assert strategy_for(study()).combine([], EQUAL).delta == {}


def test_every_run_has_its_own_noise_unless_a_simulation_asks_for_it_again() -> None:
    combines = [strategy_for(study(), key).combine for key in (None, None, b"k" * 32, b"k" * 32)]
    one, other, same, again = (of(c, [0, 0, 0]).tolist() for c in combines)
    assert one != other
    assert same == again
    # And another in every round.
    assert of(combines[2], [0, 0, 0]).tolist() != same


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_strategies_that_need_one_bounded_sum_go_with_it(name: str) -> None:
    asked = study({"sites": 9}, strategy=name, min_sites=5)
    if name in FIT:
        strategy_for(asked)
        return
    with pytest.raises(ConfigError, match=r"cannot go with \[site_privacy\]"):
        strategy_for(asked)


def test_means_over_all_hospitals_are_refused_beside_it() -> None:
    plain = {
        "name": "s",
        "task": {"kind": "risk", "classes": ["no", "yes"]},
        "record": {"features": [{"name": "x", "kind": "category"}], "scale": "federated"},
        "model": {"name": "logistic"},
        "training": {"local_steps": 1},
        "federation": {"rounds": 4, "weighting": "equal"},
        "site_privacy": {"epsilon": 2.0, "delta": 1e-3, "sites": 4},
    }
    with pytest.raises(ConfigError) as refused:
        config.parse(plain, Study, "study")
    assert len(refused.value.faults) == 2


def test_a_federation_counts_it_and_no_long_update_is_left_out_for_its_length(
    table_study: Callable[..., Study], federate: Callable[..., Outcome], tampered: Any
) -> None:
    private = SiteLevelPrivacy(epsilon=3.0, delta=1e-3, sites=5, clip=0.5)
    asked = replace(table_study(rounds=3, weighting="equal", norm_limit=2.0), site_privacy=private)

    def thousandfold(asked: Any, reply: Reply) -> Reply:
        longer = tampered(lambda d: {n: 1000 * a for n, a in d.items()})
        return longer(asked, reply) if reply.site == "h0" else reply

    outcome = federate(asked, thousandfold)
    rounds = [r for r in outcome.records if r.epsilon is not None]
    assert [r.epsilon for r in rounds] == [spent(asked, n) for n in (1, 2, 3)]
    assert not any(r.left_out for r in outcome.records)
    without = federate(replace(asked, site_privacy=None), thousandfold)
    assert any(r.left_out for r in without.records)
