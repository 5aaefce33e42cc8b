"""Robust rules: by hand, against Flower's own, and what one bad hospital can do to them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from medfl.common import config
from medfl.common.errors import ConfigError, FederationError, TooFewUpdates
from medfl.common.messages import Reply
from medfl.common.study import Study
from medfl.strategies import catalogue, held, robust
from medfl.strategies.catalogue import STRATEGIES, WEIGHTINGS, strategy_for
from medfl.strategies.strategy import Strategy

ROBUST = ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_clipping"]
CASES = WEIGHTINGS["cases"]


def updates(rows: object, cases: object = None) -> list[Reply]:
    """One update a row; its parameters are a matrix `m` of two numbers and the rest, `v`."""
    matrix = np.asarray(rows, dtype=np.float32)
    counts = [1] * len(matrix) if cases is None else list(cases)  # type: ignore[call-overload]
    return [
        Reply(site=str(i), n_cases=n, delta={"m": row[:2].reshape(1, 2), "v": row[2:]})
        for i, (row, n) in enumerate(zip(matrix, counts, strict=True))
    ]


def combined(strategy: Strategy, rows: object, cases: object = None) -> np.ndarray:
    delta = strategy.combine(updates(rows, cases), CASES).delta
    assert delta["m"].shape == (1, 2)
    assert delta["m"].dtype == delta["v"].dtype == np.float32
    return np.concatenate([delta["m"].ravel(), delta["v"]])


def random_rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 7)).astype(np.float32)


def test_median_takes_the_middle_of_each_number_and_counts_no_cases() -> None:
    rows = [[1, -9, 0], [2, 4, 0], [-7, 5, 6]]
    assert combined(catalogue.median(), rows, [1, 1, 100]).tolist() == [1, 4, 0]


def test_median_of_four_is_the_mean_of_the_middle_two() -> None:
    rows = [[1, 0, 0], [2, 0, 0], [4, 0, 0], [-50, 0, 0]]
    assert combined(catalogue.median(), rows).tolist() == [1.5, 0, 0]


def test_trimmed_mean_leaves_out_one_value_at_either_end() -> None:
    # 1, 2, 3, 4, 1000 -> (2 + 3 + 4) / 3;  -1000, -2, 0, 2, 3 -> 0
    rows = [[1, 3, 0], [1000, -2, 0], [3, 0, 0], [2, -1000, 0], [4, 2, 0]]
    assert combined(catalogue.trimmed_mean(faulty=1), rows).tolist() == [3, 0, 0]


@pytest.mark.parametrize("n", [*range(1, 20), 31, 32, 33, 100])
def test_columns_are_sorted_for_any_number_of_sites(n: int) -> None:
    block = random_rows(n, seed=n)
    before = block.copy()
    assert (robust.sorted_columns(block) == np.sort(block, axis=0)).all()
    assert (block == before).all()


def test_krum_takes_the_update_with_the_nearest_neighbours() -> None:
    # n = 5, f = 1: two neighbours. On a line: 0, 1, 3, 6, 100. Scores by hand:
    # 0: 1 + 9 = 10; 1: 1 + 4 = 5; 3: 4 + 9 = 13; 6: 9 + 25 = 34; 100: 94^2 + 97^2.
    rows = [[x, 0, 0] for x in (0, 1, 3, 6, 100)]
    assert combined(catalogue.krum(faulty=1), rows).tolist() == [1, 0, 0]
    distances = np.subtract.outer([0, 1, 3, 6, 100], [0, 1, 3, 6, 100]).astype(float) ** 2
    assert robust.krum_scores(distances, 1).tolist() == [10, 5, 13, 34, 94**2 + 97**2]


def test_multi_krum_averages_the_best_two_of_five_or_as_many_as_asked() -> None:
    rows = [[x, 0, 0] for x in (0, 1, 3, 6, 100)]  # In order of score: 1, 0, 3, 6, 100.
    assert combined(catalogue.multi_krum(), rows).tolist() == [0.5, 0, 0]
    third = combined(catalogue.multi_krum(keep=3), rows)
    np.testing.assert_allclose(third, [4 / 3, 0, 0], rtol=1e-6)
    # Five of five would take the bad one in.
    assert combined(catalogue.multi_krum(keep=5), rows).tolist() == [2.5, 0, 0]


def test_geometric_median_of_a_line_is_its_median_and_of_a_square_its_middle() -> None:
    line = [[x, 0, 0] for x in (0, 1, 100)]
    np.testing.assert_allclose(combined(catalogue.geometric_median(), line), [1, 0, 0], atol=1e-4)
    square = [[-1, 2, 0], [1, 2, 0], [1, 4, 0], [-1, 4, 0]]
    np.testing.assert_allclose(combined(catalogue.geometric_median(), square), [0, 3, 0], atol=1e-6)


def test_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    # Right angle at 0, legs 1: all sides are seen under 120 degrees from a = (3 - sqrt 3) / 6.
    at = (3 - np.sqrt(3)) / 6
    point = combined(catalogue.geometric_median(), [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(point, [at, at, 0], atol=1e-6)


def test_geometric_median_follows_who_has_more_than_half_of_the_cases() -> None:
    line = [[x, 0, 0] for x in (0, 1, 100)]
    point = combined(catalogue.geometric_median(), line, [1, 1, 3])
    np.testing.assert_allclose(point, [100, 0, 0], atol=1e-3)


def test_norm_clipping_shortens_to_the_median_norm_and_keeps_the_direction() -> None:
    # Norms 5, 1, 50: the median is 5. (3 + 0 + 0) / 3, (4 + 1 + 0) / 3, (0 + 0 - 5) / 3.
    rows = [[3, 4, 0], [0, 1, 0], [0, 0, -50]]
    expected = [1, 5 / 3, -5 / 3]
    np.testing.assert_allclose(combined(catalogue.norm_clipping(), rows), expected, rtol=1e-6)


def test_norm_clipping_to_a_bound_weighs_by_cases() -> None:
    # Bound 1: (0.6, 0.8) with 1 case, (0, 0.5) with 3.
    point = combined(catalogue.norm_clipping(bound=1.0), [[3, 4, 0], [0, 0.5, 0]], [1, 3])
    np.testing.assert_allclose(point, [0.15, 0.575, 0], rtol=1e-6)


def flowers(theirs: flower.FedAvg, rows: np.ndarray) -> np.ndarray:
    """What Flower makes of models that are the rows, with one case each."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({"m": Array(row[:2].reshape(1, 2)), "v": Array(row[2:])}),
                    "metrics": MetricRecord({"num-examples": 1}),
                }
            ),
            dst_node_id=1,
            message_type="train",
        )
        for row in rows
    ]
    arrays, _ = theirs.aggregate_train(1, replies)
    assert arrays is not None
    return np.concatenate([arrays["m"].numpy().ravel(), arrays["v"].numpy()])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (catalogue.median(), flower.FedMedian()),
        (catalogue.trimmed_mean(faulty=2), flower.FedTrimmedAvg(beta=0.2)),
        (catalogue.krum(faulty=2), flower.Krum(num_malicious_nodes=2)),
        (
            catalogue.multi_krum(faulty=2, keep=4),
            flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4),
        ),
    ],
    ids=["median", "trimmed_mean", "krum", "multi_krum"],
)
def test_robust_rules_equal_flowers_own(ours: Strategy, theirs: flower.FedAvg, seed: int) -> None:
    rows = random_rows(10, seed)
    np.testing.assert_allclose(combined(ours, rows), flowers(theirs, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 3.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("name", ROBUST)
def test_one_bad_update_of_five_moves_the_result_by_no_more_than_the_good_ones_differ(
    name: str, size: float
) -> None:
    good = random_rows(4, seed=3) + 5
    bad = -size * np.ones((1, 7), dtype=np.float32)
    result = combined(STRATEGIES[name](), np.concatenate([good, bad]))
    centre = good.mean(axis=0)
    spread = max(np.linalg.norm(row - centre) for row in good)
    # A clipped update still counts with its direction: up to twice the median norm, a fifth of it.
    allowed = 0.4 * np.median(np.linalg.norm(good, axis=1)) if name == "norm_clipping" else 0.0
    assert np.linalg.norm(result - centre) <= 2 * spread + 1.1 * allowed


def test_the_plain_mean_does_not_stand_one_bad_update() -> None:
    rows = np.concatenate([random_rows(4), 1e6 * np.ones((1, 7), dtype=np.float32)])
    assert np.linalg.norm(combined(catalogue.fedavg(), rows)) > 1e5


@pytest.mark.parametrize("name", ROBUST)
def test_no_order_of_the_sites_changes_the_result(name: str) -> None:
    rows, cases = random_rows(6, seed=8), [3, 1, 4, 1, 5, 9]
    expected = combined(STRATEGIES[name](), rows, cases)
    rng = np.random.default_rng(0)
    for _ in range(10):
        order = rng.permutation(6)
        again = combined(STRATEGIES[name](), rows[order], [cases[i] for i in order])
        np.testing.assert_allclose(again, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
def test_blocks_and_the_disk_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(7, seed=5)
    expected = combined(STRATEGIES[name](), rows)
    monkeypatch.setattr(held, "BLOCK_BYTES", 4 * 7 * 3)  # Three columns at a time, of seven.
    monkeypatch.setattr(held, "IN_MEMORY_BYTES", 16)
    np.testing.assert_allclose(combined(STRATEGIES[name](), rows), expected, rtol=1e-6, atol=1e-7)


def test_memory_does_not_grow_with_the_number_of_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(held, "IN_MEMORY_BYTES", 2**18)
    monkeypatch.setattr(held, "BLOCK_BYTES", 2**17)
    model = 2**16  # numbers: 256 KiB

    def many(n: int) -> Iterator[Reply]:
        for i in range(n):
            yield Reply(site=str(i), n_cases=1, delta={"w": np.full(model, i, dtype=np.float32)})

    peaks = []
    for n in (8, 32):
        tracemalloc.start()
        for name in ROBUST:
            STRATEGIES[name]().combine(many(n), CASES)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 10 * 4 * model


@pytest.mark.parametrize(
    ("name", "fewest"), [("krum", 5), ("multi_krum", 5), ("trimmed_mean", 3), ("median", 3)]
)
def test_too_few_updates_are_refused_in_words(name: str, fewest: int) -> None:
    strategy = STRATEGIES[name]()
    assert strategy.fewest == fewest
    with pytest.raises(TooFewUpdates, match=f"{name} needs {fewest} updates a round and has"):
        strategy.combine(updates(random_rows(fewest - 1)), CASES)
    assert strategy.combine([], CASES).n_sites == 0


def test_updates_with_different_parameters_are_not_mixed() -> None:
    odd = Reply(site="x", n_cases=1, delta={"m": np.zeros((1, 2), dtype=np.float32)})
    with pytest.raises(FederationError, match="different parameters"):
        catalogue.median().combine([*updates(random_rows(2)), odd], CASES)


def study(strategy: str, min_sites: int, **options: object) -> Study:
    return config.parse(
        {
            "name": "s",
            "task": {"kind": "risk", "classes": ["no", "yes"]},
            "record": {"features": [{"name": "age"}]},
            "model": {"name": "logistic"},
            "training": {"local_steps": 1},
            "federation": {
                "rounds": 1,
                "strategy": strategy,
                "min_sites": min_sites,
                "options": options,
            },
        },
        Study,
        "study",
    )


def test_a_study_must_ask_for_as_many_sites_as_its_rule_needs() -> None:
    assert strategy_for(study("krum", 7, faulty=2)).fewest == 7
    with pytest.raises(ConfigError, match=r"krum as it is set needs 7 updates .* raise min_sites"):
        strategy_for(study("krum", 6, faulty=2))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("krum", "faulty", -1),
        ("trimmed_mean", "faulty", -1),
        ("multi_krum", "keep", -1),
        ("geometric_median", "smoothing", 0.0),
        ("norm_clipping", "bound", -1.0),
    ],
)
def test_an_option_out_of_range_is_named(name: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"federation\.options\.{option}: must be"):
        strategy_for(study(name, 9, **{option: value}))
