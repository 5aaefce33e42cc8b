"""The benchmarks run, and what they compare ends with the same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medfl.simulations.benchmarks import __main__ as benchmarks
from medfl.simulations.benchmarks import dp, images, plain, shares
from medfl.simulations.benchmarks.rows import Row, Spread, write


def test_a_row_tells_medians_spread_and_ratios(tmp_path: Path) -> None:
    row = Row("w", Spread.of([3.0, 1.0, 2.0]), {"other": Spread.of([10.0])}, "s", 4.0, True)
    assert row.ratios == {"other": 5.0}
    assert str(row) == "w: medfl 2 (1 to 3) s; other 10 (5 x); limit 4; results agree"
    write(tmp_path / "x.json", "x", "2026-01-02", [row])
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["rows"][0]["medfl"] == {"median": 2.0, "values": [1.0, 2.0, 3.0]}
    assert told["machine"]["versions"]["flwr"].startswith("1.41")


def test_models_that_differ_are_told_apart() -> None:
    one = {"w": np.array([1.0, -2.0], np.float32)}
    assert plain.same(one, {"w": np.array([1.0, -2.00001], np.float32)})
    assert not plain.same(one, {"w": np.array([1.0, -2.001], np.float32)})
    assert not plain.same(one, {"v": one["w"]})


def test_the_distance_of_two_models_is_that_of_their_farthest_parameter() -> None:
    one = {"w": np.array([1.0, -2.0], np.float32), "b": np.array([0.0], np.float32)}
    other = {"w": np.array([1.0, -1.5], np.float32), "b": np.array([0.25], np.float32)}
    assert plain.apart(one, one, 0.5) == 0
    assert plain.apart(one, other, 0.5) == 0.5  # b: .25 / (0 + .5), above w's .5 / 2.5
    assert plain.apart(one, {"w": one["w"]}, 0.5) == np.inf
    assert not plain.apart(one, one | {"b": np.array([np.nan], np.float32)}, 0.5) <= 1e9


def test_the_plain_loop_is_the_mean_of_the_hospitals_steps() -> None:
    """One input, one unit a layer, all weights 0: only the last bias moves: rate (mean y - 1/2)."""
    zeros = {
        "1.weight": np.zeros((1, 3), np.float32),
        "1.bias": np.zeros(1, np.float32),
        "3.weight": np.zeros((1, 1), np.float32),
        "3.bias": np.zeros(1, np.float32),
    }
    after, seconds = plain.loop(zeros, sites=2, rounds=1)
    labels = np.concatenate([plain.table(site)[1] for site in range(2)])
    assert after["3.bias"][0] == pytest.approx(plain.LEARNING_RATE * (labels.mean() - 0.5))
    assert not after["1.weight"].any()
    assert len(seconds) == 1


def test_clipped_sums_agree_where_they_are_near_or_only_rounding_parts_them() -> None:
    exact = {"medfl": 2e-3, "opacus": 2e-3, "functorch": 1e-3}
    assert dp._is_near({"medfl": 1e-6}, {"medfl": 1.0, "opacus": 0.1})
    assert dp._is_near({"medfl": 2e-3}, exact)
    assert not dp._is_near({"medfl": 2e-3}, exact | {"medfl": 4e-3})
    assert not dp._is_near({"medfl": np.nan}, exact | {"medfl": np.nan})


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["nonsense"]) == 2
    assert "nonsense: is no benchmark" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    ["aggregate", "data", "dp", "latency", "memory", "scale", "secagg", "stacked", "wire"],
)
def test_a_benchmark_runs_small_and_its_results_agree(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmarks.main([name, "--small", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"][name]
    assert [row["agree"] for row in rows if row["agree"] is not None] != []
    assert all(row["agree"] is not False for row in rows)
    assert all(row["medfl"]["values"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_simulation_ends_with_the_plain_loops_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["simulation", "--small", "--json"]) == 0
    work, start, *helps = json.loads(capsys.readouterr().out)["rows"]["simulation"]
    assert work["agree"] is True
    assert work["rivals"]["plain loop"]["values"]
    assert start["medfl"]["values"]
    assert len(helps) == 3


def test_the_shares_hold_every_case_once_and_the_plain_loop_learns_from_them(
    tmp_path: Path,
) -> None:
    work = shares.ImageWork("cnn", 3, rounds=2)
    study = shares.write(work, shares.made_up(120), tmp_path)
    data = images.Data(tmp_path)
    parts = [data.part(site, p) for site in range(3) for p in ("train", "validation", "test")]
    assert sum(len(labels) for _, labels in parts) == 120
    assert len(study.task.classes) == 2
    model = images.network("cnn")
    before = {name: t.clone() for name, t in data.first.items()}
    after, cases = images.round_at(data, model, before, 0, 1)
    assert cases == len(parts[0][1])
    assert not any(torch.equal(after[name], t) for name, t in before.items())
