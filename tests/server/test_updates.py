"""What the report says of hospitals' updates: a table, and who pulls against the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medfl.common.study import Study
from medfl.server.report.run import Outcome, Round, Run
from medfl.server.report.updates import against_the_rest, updates_table
from medfl.strategies.catalogue import ROBUST

Seen = dict[str, tuple[float, float | None]]
USUAL: Seen = {"a": (1.0, 0.8), "b": (1.2, 0.7), "c": (0.9, 0.75)}


@pytest.fixture
def run(risk_study: Callable[..., Study], tmp_path: Path) -> Callable[..., Run]:
    def make(rounds: list[Seen], strategy: str = "fedavg") -> Run:
        study = risk_study(federation={"strategy": strategy})
        lines = [
            Round(
                run="main",
                number=number,
                metrics={},
                loss=None,
                site_metrics={site: {} for site in seen},
                site_loss={},
                site_epsilon={},
                left_out={},
                void=False,
                site_length={site: length for site, (length, _) in seen.items()},
                site_cosine={site: cosine for site, (_, cosine) in seen.items()},
            )
            for number, seen in enumerate(rounds, start=1)
        ]
        return Run(tmp_path, study, {}, Outcome((), {}, {}, {}), {}, tuple(lines))

    return make


def test_medians_over_the_rounds_are_shown(run: Callable[..., Run]) -> None:
    table = updates_table(run([USUAL, {**USUAL, "a": (5.0, -0.9)}, {**USUAL, "a": (3.0, 0.1)}]))
    assert table is not None
    assert [cell for cell, _ in table.rows[0]] == ["a", "3", "3", "0.10"]
    assert updates_table(run([])) is None


def test_a_hospital_that_pulls_against_the_others_is_named(run: Callable[..., Run]) -> None:
    odd: Seen = {**USUAL, "c": (1.0, -0.62)}
    (said,) = against_the_rest(run([odd] * 3))
    assert said.startswith(
        "c pulls against the others: over 3 rounds the median cosine of its update to theirs is"
    )
    assert "a robust strategy (median, trimmed_mean, krum) bounds what one hospital can do" in said
    (robust,) = against_the_rest(run([odd] * 3, "median"))
    assert "a robust strategy" not in robust
    assert not list(against_the_rest(run([USUAL] * 3)))
    # Two rounds, or two hospitals, are too few to say whose fault it is.
    assert not list(against_the_rest(run([odd] * 2)))
    pair: Seen = {"a": (1.0, -0.9), "c": (1.0, -0.9)}
    assert not list(against_the_rest(run([pair] * 5)))


def test_a_hospital_that_moves_the_model_far_more_is_named(run: Callable[..., Run]) -> None:
    (said,) = against_the_rest(run([{**USUAL, "b": (4.75, 0.7)}] * 3))
    # 4.75 beside the median .95 of .9 and 1.0.
    assert said.startswith(
        "b moves the model more than the others: over 3 rounds its updates are 5.0"
    )


def test_the_robust_strategies_are_those_that_bound_one_hospital() -> None:
    assert set(ROBUST) == {
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "norm_clipping",
    }
