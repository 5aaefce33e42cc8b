"""Headline, sentences and what is noticed at the top, from the facts of a run made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medfl.common.study import Simulation, Study
from medfl.server.report import curves, tables
from medfl.server.report.noticed import noticed
from medfl.server.report.run import Outcome, Round, Run, SiteResult
from medfl.server.report.summary import limits, summary
from medfl.server.report.verdict import verdict


def site(name: str, auroc: float | None = 0.8, **more: Any) -> SiteResult:
    plain: dict[str, Any] = {
        "name": name,
        "n_train": 100,
        "n_validation": 20,
        "n_test": 60,
        "metrics": {"auroc": auroc},
        "intervals": {},
        "epsilon": None,
        "delta": None,
        "quarantined": {},
    }
    return SiteResult(**{**plain, **more})


def way(
    pooled: float | None = None,
    pair: tuple[float, float] | None = None,
    mean: float | None = None,
    sites: tuple[SiteResult, ...] = (),
) -> Outcome:
    sites = sites or (site("a"), site("b"))
    return Outcome(sites, {"auroc": mean}, {"auroc": pooled}, {"auroc": pair})


def round_(number: int, names: str = "ab", **more: Any) -> Round:
    plain: dict[str, Any] = {
        "run": "main",
        "number": number,
        "metrics": {},
        "loss": 0.5,
        "site_metrics": {name: {} for name in names},
        "site_loss": {},
        "site_epsilon": {},
        "left_out": {},
        "void": False,
    }
    return Round(**{**plain, **more})


@pytest.fixture
def run(risk_study: Callable[..., Study], tmp_path: Path) -> Callable[..., Run]:
    def make(
        federated: Outcome, facts: Mapping[str, Any] | None = None, rounds: Any = (), **ways: Any
    ) -> Run:
        return Run(tmp_path, risk_study(), facts or {}, federated, ways, tuple(rounds))

    return make


OURS = way(0.8, (0.75, 0.85), 0.8)


@pytest.mark.parametrize(
    ("local", "pooled", "said"),
    [
        (way(0.6, (0.55, 0.65), 0.6), None, "Better than training alone"),
        (
            way(0.79, (0.74, 0.84), 0.7),
            None,
            "No better than training alone, as far as these test cases tell",
        ),
        (way(0.95, (0.93, 0.97), 0.9), None, "Worse than training alone"),
        (None, way(0.9, (0.86, 0.94)), "Worse than pooled training"),
        (
            way(0.6, (0.55, 0.65), 0.6),
            way(0.82, (0.77, 0.87)),
            "Better than training alone and level with pooled training, as far as these test "
            "cases tell",
        ),
        (
            way(0.6, (0.55, 0.65), 0.9),
            None,
            "Better than training alone; but worse than alone on average over hospitals",
        ),
        (
            way(0.6, None, 0.6),
            None,
            "Whether federation paid cannot be told: the results have no intervals",
        ),
        (None, None, "What the federated model reached"),
    ],
)
def test_the_headline_follows_from_the_interval_over_all_test_cases(
    run: Callable[..., Run], local: Outcome | None, pooled: Outcome | None, said: str
) -> None:
    ways = {"local": local, "pooled": pooled}
    made = run(OURS, **{name: one for name, one in ways.items() if one is not None})
    assert verdict(made, "auroc") == said


def test_of_a_metric_where_less_is_better_the_smaller_one_is_better(
    run: Callable[..., Run],
) -> None:
    def brier(value: float) -> Outcome:
        pair = (value - 0.01, value + 0.01)
        return Outcome((site("a"),), {"brier": value}, {"brier": value}, {"brier": pair})

    assert verdict(run(brier(0.1), local=brier(0.3)), "brier") == "Better than training alone"
    assert verdict(run(brier(0.3), local=brier(0.1)), "brier") == "Worse than training alone"


def test_a_real_federation_of_a_study_with_a_simulation_table_was_no_simulation(
    run: Callable[..., Run],
) -> None:
    made = run(way(mean=0.8))
    made = replace(made, study=replace(made.study, simulation=Simulation()))
    assert any("This was a simulation" in line for line in limits(made))
    real = replace(made, facts={"kind": "federation"})
    assert not any("simulation" in line for line in limits(real))


def test_a_hospital_in_all_rounds_did_not_stay_away_and_one_in_some_is_counted(
    run: Callable[..., Run],
) -> None:
    facts = {"refused": {"a": "not connected", "b": "not connected", "c": "privacy budget spent"}}
    rounds = [round_(1), round_(2, "a", left_out={"b": "late"}), round_(3)]
    assert noticed(run(OURS, facts, rounds)) == [
        "b took part in 2 of 3 rounds: not connected",
        "c took no part: privacy budget spent",
        "b was left out of 1 round: late",
    ]


def test_who_trained_and_is_missing_from_the_test_is_named_with_its_privacy(
    run: Callable[..., Run],
) -> None:
    rounds = [round_(1, "abp", site_epsilon={"a": None, "p": 1.204})]
    made = run(OURS, rounds=rounds)
    assert noticed(made) == ["p trained and did not answer at the end: its test cases are missing"]
    assert "1 of 3 hospitals trained under differential privacy, with ε of at most 1.21" in (
        summary(made, "auroc")
    )


def test_a_hospital_that_is_unlike_the_others_stands_at_the_top(run: Callable[..., Run]) -> None:
    facts = {"unlike": {"b": ["chol: the same value in every case", "age: a mean far off"]}}
    assert noticed(run(OURS, facts)) == [
        "b is unlike the other hospitals in chol: the same value in every case; age: a mean far off"
    ]


def test_a_hospital_whose_labels_are_turned_round_is_named(run: Callable[..., Run]) -> None:
    turned = site("c", 0.06, intervals={"auroc": (0.01, 0.14)})
    unsure = site("d", 0.40, intervals={"auroc": (0.2, 0.6)})
    few = site("e", 0.0, n_test=4, intervals={"auroc": (0.0, 0.1)})
    told = site("f", 0.12, n_test=None)
    made = run(
        way(0.7, sites=(site("a"), turned, unsure, few, told)), local=way(sites=(site("c", 0.97),))
    )
    lines = noticed(made)
    assert [line.split()[0] for line in lines] == ["c", "f"]
    assert "AUROC there is 0.060, far below chance; its own model reaches 0.970" in lines[0]


def test_a_hospital_that_every_other_model_ranks_backwards_is_named_where_the_common_one_gave_up(
    run: Callable[..., Run],
) -> None:
    tested = {
        "a": {"a": {"auroc": 0.9}, "b": {"auroc": 0.8}, "c": {"auroc": 0.1}},
        "b": {"a": {"auroc": 0.8}, "b": {"auroc": 0.9}, "c": {"auroc": 0.2}},
        "c": {"a": {"auroc": 0.1}, "b": {"auroc": 0.2}, "c": {"auroc": 0.9}},
    }
    sites = tuple(site(name, 0.55) for name in "abc")
    made = run(way(0.55, sites=sites), local=replace(way(0.9), elsewhere=tested))
    assert [line.split()[0] for line in noticed(made)] == ["c"]
    two = {whose: {w: v for w, v in t.items() if w != "b"} for whose, t in tested.items()}
    two.pop("b")
    made = run(way(0.55, sites=sites[::2]), local=replace(way(0.9), elsewhere=two))
    assert noticed(made) == []


def test_a_hospital_with_test_cases_alone_is_no_hospital_that_trained(
    run: Callable[..., Run],
) -> None:
    made = run(way(0.8, sites=(site("a"), site("new", n_train=0))), rounds=[round_(1, "a")])
    said = [line for line in limits(made) if "took no part in training" in line]
    assert said
    assert said[0].startswith("new took no part in training")
    both = run(OURS, rounds=[round_(1)])
    assert any("Every hospital in the test also took part" in line for line in limits(both))


def test_a_best_round_is_claimed_only_where_a_metric_chose_it(run: Callable[..., Run]) -> None:
    made = run(OURS, {"rounds": 4, "selected_round": 4}, [round_(1), round_(2)])
    how = replace(made.study.federation, keep="best", best_metric="auroc")
    made = replace(made, study=replace(made.study, federation=how))
    assert dict(tables.made(made))["Rounds"] == (
        "4; the published model is that of round 4 (the last: no hospital could measure AUROC)"
    )
    assert not any("chosen on validation" in line for line in limits(made))
    measured = replace(made, rounds=(round_(1, metrics={"auroc": 0.7}),))
    assert "(best AUROC)" in dict(tables.made(measured))["Rounds"]
    assert any("chosen on validation" in line for line in limits(measured))


def test_a_mean_says_over_how_many_hospitals_and_cases_it_is(run: Callable[..., Run]) -> None:
    sites = (site("a"), site("b", None), site("c", 0.6, n_test=45))
    table = tables.mean_table(run(way(mean=0.7, sites=sites)))
    assert table.caption.startswith("Mean over 2 of 3 hospitals, 105 test cases: ")
    assert table.rows[0][1] == ("0.700", "")
    alone = way(mean=0.6, sites=(site("a"), site("b"), site("c", 0.6, n_test=45)))
    (row,) = tables.mean_table(run(way(mean=0.7, sites=sites), local=alone)).rows
    assert row[1] == ("0.700", "2 of 3 hospitals, 105 test cases")
    assert row[2] == ("0.600", "3 of 3 hospitals, 165 test cases")


def test_every_comparison_has_its_curve(run: Callable[..., Run]) -> None:
    names = ["main", "fedadam", "fedavgm", "fedprox", "fedyogi", "local", "pooled", "scaffold"]
    rounds = [round_(n, run=name) for name in names for n in (1, 2)]
    drawn = str(curves.over_rounds(run(OURS, rounds=rounds), None))
    for name in ("fedyogi", "Each hospital alone", "Pooled in one place", "scaffold"):
        assert name in drawn


@pytest.mark.parametrize(
    ("strategy", "said"),
    [("fedbn", "the shared part alone"), ("local", "the untrained start alone"), ("fedavg", "")],
)
def test_where_layers_stay_at_home_the_report_says_what_the_published_file_holds(
    run: Callable[..., Run], strategy: str, said: str
) -> None:
    made = run(OURS)
    how = replace(made.study.federation, strategy=strategy)
    made = replace(made, study=replace(made.study, federation=how))
    lines = [line for line in noticed(made) if "published file" in line]
    assert [said in line for line in lines] == [True] * bool(said)


def test_the_specificity_of_one_healthy_patient_is_not_on_the_page(
    run: Callable[..., Run],
) -> None:
    """Nor is another share of few cases of a class; what counts all cases alike stays."""
    metrics = {"specificity": 1.0, "auroc": 0.91, "accuracy": 0.87}
    few = site("a", metrics=metrics, smallest_class=1)
    enough = site("b", metrics=metrics, smallest_class=5)
    made = run(way(0.8, sites=(few, enough)))
    (table,) = tables.site_tables(made, "auroc")
    assert [text for text, _ in table.rows[0]] == ["a", "too few", "too few", "0.870"]
    assert [text for text, _ in table.rows[1]] == ["b", "0.910", "1.000", "0.870"]
    assert [s.name for s in curves.ranked(made.federated, "auroc")] == ["b"]


def test_models_trained_alone_stand_in_a_table_of_all_hospitals_cases(
    run: Callable[..., Run],
) -> None:
    tested = {"a": {"a": {"auroc": 0.9}, "b": {"auroc": 0.55}}, "b": {"a": {"auroc": 0.5}}}
    local = replace(way(0.7), elsewhere=tested)
    table = tables.site_tables(run(OURS, local=local), "auroc")[-1]
    assert table.head == ["Model", "Tested at a", "Tested at b"]
    assert [[text for text, _ in row] for row in table.rows] == [
        ["Federated model", "0.800", "0.800"],
        ["Trained at a", "0.900", "0.550"],
        ["Trained at b", "0.500", "–"],
    ]
