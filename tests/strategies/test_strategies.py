"""Strategies: by hand first, then against Flower's own where it has one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from medfl.common import config
from medfl.common.errors import ConfigError
from medfl.common.messages import Reply
from medfl.common.study import SecureAggregation, Study
from medfl.strategies import catalogue
from medfl.strategies.catalogue import STRATEGIES, WEIGHTINGS, strategy_for
from medfl.strategies.strategy import ServerState, Strategy, weighted_mean


def update(site: str, value: float, cases: int) -> Reply:
    return Reply(site=site, n_cases=cases, delta={"w": np.array([value], dtype=np.float32)})


def study(strategy: str, **more: object) -> Study:
    return config.parse(
        {
            "name": "s",
            "task": {"kind": "risk", "classes": ["no", "yes"]},
            "record": {"features": [{"name": "age"}]},
            "model": {"name": "logistic"},
            "training": {"local_steps": 1, **dict(more.pop("training", {}))},  # type: ignore[call-overload]
            "federation": {"rounds": 1, "strategy": strategy, **more},
        },
        Study,
        "study",
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_secure_aggregation_serves_what_needs_only_a_sum(name: str) -> None:
    sums = {"fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold", "fedbn"}
    secure = {"control_range": 1.0} if name == "scaffold" else {}
    asked = replace(study(name, min_sites=9), secure_aggregation=SecureAggregation(**secure))
    if name in sums:
        assert strategy_for(asked).needs_only_a_sum
    else:
        with pytest.raises(ConfigError, match=f"{name} looks at single updates.* use one of fed"):
            strategy_for(asked)
        # A comparison on one machine may look.
        other = replace(asked.federation, strategy="fedavg")
        assert strategy_for(replace(asked, federation=other).with_strategy(name))


@pytest.mark.parametrize(
    ("name", "secure", "advice"),
    [("fedavg", {"control_range": 1.0}, "remove it"), ("scaffold", {}, "write what one may")],
)
def test_a_range_of_control_variates_goes_with_scaffold(name, secure, advice) -> None:
    asked = replace(study(name, min_sites=2), secure_aggregation=SecureAggregation(**secure))
    with pytest.raises(ConfigError, match=f"control_range: goes with scaffold.*{advice}"):
        strategy_for(asked)


def test_a_comparison_with_another_strategy_is_in_the_open() -> None:
    asked = replace(study("fedavg", min_sites=3), secure_aggregation=SecureAggregation())
    assert asked.with_strategy("median").secure_aggregation is None
    assert asked.with_strategy("fedavg").secure_aggregation is not None


def test_mean_counts_cases_not_hospitals() -> None:
    combined = weighted_mean([update("a", 4.0, 1), update("b", 0.0, 3)], WEIGHTINGS["cases"])
    assert combined.delta["w"] == pytest.approx([1.0])


def test_equal_weighting_counts_hospitals() -> None:
    combined = weighted_mean([update("a", 4.0, 1), update("b", 0.0, 3)], WEIGHTINGS["equal"])
    assert combined.delta["w"] == pytest.approx([2.0])


def test_square_root_weighting_lies_between() -> None:
    combined = weighted_mean([update("a", 3.0, 1), update("b", 0.0, 4)], WEIGHTINGS["sqrt_cases"])
    assert combined.delta["w"] == pytest.approx([1.0])


def test_mean_leaves_the_updates_untouched() -> None:
    first = update("a", 4.0, 1)
    weighted_mean([first, update("b", 0.0, 3)], WEIGHTINGS["cases"])
    assert first.delta["w"] == [4.0]


def test_mean_of_no_update_is_no_change() -> None:
    combined = weighted_mean([], WEIGHTINGS["cases"])
    assert combined.n_sites == 0
    assert combined.delta == {}


def test_server_momentum_by_hand() -> None:
    # m1 = 1, w = 0 + .5 * 1; m2 = .9 * 1 + 1 = 1.9, w = .5 + .5 * 1.9
    step = catalogue.fedavgm(learning_rate=0.5, momentum_beta=0.9).server_step
    one = {"w": np.array([1.0], dtype=np.float32)}
    weights, state = step({"w": np.zeros(1, dtype=np.float32)}, one, ServerState())
    weights, _ = step(weights, one, state)
    assert weights["w"] == pytest.approx([1.45])


def test_integer_buffers_pass_through_every_server_step() -> None:
    weights = {"w": np.zeros(1, dtype=np.float32), "seen": np.array(7)}
    for name, make in STRATEGIES.items():
        new, _ = make().server_step(weights, {"w": np.ones(1, dtype=np.float32)}, ServerState())
        assert new["seen"] == 7, name
        assert new["w"].dtype == np.float32, name


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_ignores_how_the_hospitals_are_called(name: str) -> None:
    strategy = STRATEGIES[name]()
    said = {"a": (-1.0, 2), "b": (3.0, 5), "c": (0.5, 1), "d": (9.0, 3), "e": (0.0, 1)}
    updates = [update(site, value, cases) for site, (value, cases) in said.items()]
    forward = strategy.combine(updates, WEIGHTINGS["cases"]).delta["w"]
    backward = strategy.combine(updates[::-1], WEIGHTINGS["cases"]).delta["w"]
    np.testing.assert_allclose(forward, backward, rtol=1e-6)


class TwoNodes(Grid):
    """Just enough of a grid for Flower's strategies to address two nodes."""

    run = property(lambda self: None)  # type: ignore[assignment]

    def set_run(self, run: object) -> None: ...

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [1, 2]

    def push_messages(self, messages: object) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: object) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


def flowers_rounds(theirs: flower.FedAvg, deltas: list[list[np.ndarray]]) -> np.ndarray:
    """Flower's weights after rounds in which two sites (2 and 3 cases) move by `deltas`."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    arrays = ArrayRecord({"w": Array(np.array([0.5, -0.25, 2.0]))})
    for number, moves in enumerate(deltas, start=1):
        asked = list(theirs.configure_train(number, arrays, ConfigRecord(), TwoNodes()))
        replies = []
        for message, move, cases in zip(asked, moves, (2, 3), strict=True):
            content = RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(arrays["w"].numpy() + move)}),
                    "metrics": MetricRecord({"num-examples": cases}),
                }
            )
            replies.append(Message(content, reply_to=message))
        new, _ = theirs.aggregate_train(number, replies)
        assert new is not None
        arrays = new
    return arrays["w"].numpy()


def our_rounds(ours: Strategy, deltas: list[list[np.ndarray]]) -> np.ndarray:
    weights, state = {"w": np.array([0.5, -0.25, 2.0])}, ServerState()
    for moves in deltas:
        updates = [
            Reply(site=str(i), n_cases=n, delta={"w": move})
            for i, (move, n) in enumerate(zip(moves, (2, 3), strict=True))
        ]
        combined = ours.combine(updates, WEIGHTINGS["cases"])
        weights, state = ours.server_step(weights, combined.delta, state)
    return weights["w"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (catalogue.fedavg(), flower.FedAvg()),
        (
            catalogue.fedavgm(learning_rate=0.7, momentum_beta=0.9),
            flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
        ),
        (catalogue.fedadagrad(learning_rate=0.1), flower.FedAdagrad(eta=0.1, tau=1e-3)),
        (
            catalogue.fedadam(learning_rate=0.1),
            flower.FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
        ),
        (
            catalogue.fedyogi(learning_rate=0.01),
            flower.FedYogi(eta=0.01, beta_1=0.9, beta_2=0.99, tau=1e-3),
        ),
    ],
    ids=["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"],
)
def test_server_side_mathematics_equals_flowers_own(ours: Strategy, theirs: flower.FedAvg) -> None:
    rng = np.random.default_rng(0)
    deltas = [[rng.normal(size=3), rng.normal(size=3)] for _ in range(4)]
    # Ours adds in float64 and rounds the mean to float32, as weights are.
    np.testing.assert_allclose(
        our_rounds(ours, deltas), flowers_rounds(theirs, deltas), rtol=1e-5, atol=1e-6
    )


def test_unknown_strategy_is_named_with_the_catalogue() -> None:
    with pytest.raises(ConfigError, match="'fedavgg' is not in the catalogue; use one of fedavg"):
        strategy_for(study("fedavgg"))


def test_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"federation\.options\.nu: is not a known option"):
        strategy_for(study("fedprox", options={"nu": 1.0}))


def test_scaffold_refuses_momentum_because_its_correction_would_be_wrong() -> None:
    with pytest.raises(ConfigError, match="scaffold corrects plain SGD steps"):
        strategy_for(study("scaffold", training={"momentum": 0.9}))
