"""Two runs are compared by their ratios; seconds of another machine say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medfl.simulations.benchmarks import __main__ as benchmarks
from medfl.simulations.benchmarks.compare import verdicts
from medfl.simulations.benchmarks.rows import Row, Spread, write


def row(seconds: float, rival: float, *, work: str = "w", agree: bool = True) -> dict[str, Any]:
    made = Row(work, Spread.of([seconds]), {"rival": Spread.of([rival])}, "s", None, agree)
    return made.plain()


def models(of: float) -> dict[str, Any]:
    return Row("memory", Spread.of([of]), {}, "models", 3.0, True).plain()


def test_a_slower_machine_is_not_worse_and_a_lower_ratio_is() -> None:
    """4 s against 1 s is a ratio of 4; 40 against 10 is the same; 40 against 13 is 3.08."""
    (same,) = verdicts([row(1.0, 4.0)], [row(10.0, 40.0)], 0.15)
    assert (same.old, same.new, same.worse) == (4.0, 4.0, False)
    (fell,) = verdicts([row(1.0, 4.0)], [row(13.0, 40.0)], 0.15)
    assert fell.worse
    (stood,) = verdicts([row(1.0, 4.0)], [row(13.0, 40.0)], 0.3)
    assert not stood.worse


def test_what_has_no_rival_is_measured_by_its_limit() -> None:
    """3 / 2 = 1.5 may fall to 1.275; 3 / 2.5 is 1.2."""
    assert [v.worse for v in verdicts([models(2.0)], [models(2.3)], 0.15)] == [False]
    assert [v.worse for v in verdicts([models(2.0)], [models(2.5)], 0.15)] == [True]


def test_seconds_without_a_rival_are_left_alone() -> None:
    alone = Row("w", Spread.of([1.0]), {}, "s", 2.0).plain()
    assert verdicts([alone], [alone | {"medfl": {"median": 99.0}}], 0.15) == []


def test_what_is_gone_or_differs_is_worse() -> None:
    assert [v.worse for v in verdicts([row(1.0, 4.0)], [], 0.15)] == [True]
    differing = verdicts([row(1.0, 4.0)], [row(1.0, 4.0, agree=False)], 0.15)
    assert [(v.against, v.worse) for v in differing] == [("rival", False), ("equal results", True)]


@pytest.mark.parametrize(("rival", "code", "said"), [(4.0, 0, "as good"), (2.0, 1, "WORSE")])
def test_the_exit_code_says_it(
    rival: float, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write(old, "x", "2026-01-02", [Row("w", Spread.of([1.0]), {"r": Spread.of([4.0])}, "s")])
    new.write_text(json.dumps({"rows": {"x": [row(1.0, rival) | {"ratios": {"r": rival}}]}}))
    assert benchmarks.main(["compare", str(old), str(new)]) == code
    assert capsys.readouterr().out.startswith(said)


def test_another_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("[]")
    assert benchmarks.main(["compare", str(tmp_path / "x.json"), str(tmp_path / "x.json")]) == 2
    assert "holds no rows of a benchmark" in capsys.readouterr().err
