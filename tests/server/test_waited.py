"""A run says whom it waited for, and how much of that was the hospital's own work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medfl.common.messages import Instruction, Reply
from medfl.common.study import Study
from medfl.server.cli_runs import _round_line
from medfl.server.records import RoundRecord, round_record, slowest
from medfl.server.register import Roster
from medfl.server.report.run import Outcome, Round, Run
from medfl.server.report.tables import waiting_table
from medfl.server.rounds import run_study


def record(answered: dict[str, float]) -> RoundRecord:
    asked = Instruction(kind="round", study_digest="d", run="main", round=3)
    replies = [Reply(site="a", seconds=2.0, answered=4.0), Reply(site="b", answered=9.5)]
    return round_record(asked, replies, {"c": "late"}, seconds=30.0, answered=answered)


def test_the_line_of_a_round_names_who_was_waited_for_longest_also_in_vain() -> None:
    assert record({}).answered == {"a": 4.0, "b": 9.5}
    assert slowest(record({})) == "longest waited for b: 9.5 s"
    assert (
        slowest(record({"a": 20.0})) == "longest waited for a: 20.0 s, of which 2.0 s its own work"
    )
    late = record({"c": 30.0})
    assert slowest(late) == "longest waited for c: 30.0 s"
    assert "; longest waited for c: 30.0 s; without c (late)" in _round_line(late, 10)
    assert slowest(replace(late, answered={"a": 1.0})) == ""


def test_the_roster_knows_when_the_last_part_of_an_answer_came() -> None:
    roster, began = Roster(), time.monotonic()
    assert roster.answered_s("a", began) == 0.0
    roster.moved("a")
    assert 0.0 <= roster.answered_s("a", began) < 5.0
    assert roster.answered_s("a", began + 100) == 0.0


def line(number: int, answered: dict[str, float | None], own: dict[str, float | None]) -> Round:
    return Round(
        run="main", number=number, metrics={}, loss=None, site_metrics={}, site_loss={},
        site_epsilon={}, left_out={}, void=False, answered=answered, site_seconds=own,
    )  # fmt: skip


def test_the_report_has_medians_and_who_was_last(
    risk_study: Callable[..., Study], tmp_path: Path
) -> None:
    rounds = (
        line(1, {"a": 4.0, "b": 10.0}, {"a": 3.0, "b": None}),
        line(2, {"a": 6.0, "b": 8.0}, {"a": 5.0, "b": None}),
        line(3, {"a": 30.0, "b": 9.0}, {"a": 4.0, "b": None}),
    )
    run = Run(tmp_path, risk_study(), {}, Outcome((), {}, {}, {}), {}, rounds)
    table = waiting_table(run)
    assert table is not None
    assert [[cell for cell, _ in row] for row in table.rows] == [
        ["a", "6.0", "4.0", "1 of 3"],
        ["b", "9.0", "–", "2 of 3"],
    ]
    assert waiting_table(replace(run, rounds=(line(1, {}, {}),))) is None


@pytest.mark.parametrize("late", [False, True])
def test_a_run_keeps_how_long_each_hospital_was_waited_for(
    risk_study: Callable[..., Study],
    risk_hospital: Callable[..., object],
    tmp_path: Path,
    late: bool,
) -> None:
    from collections.abc import Iterable, Iterator

    from medfl.client.hospital import Hospital, answer

    study = risk_study()
    hospitals: dict[str, Hospital] = {
        name: risk_hospital(study, tmp_path, name=name)  # type: ignore[misc]
        for name in ("a", "b")
    }

    class Timed:
        def names(self) -> list[str]:
            return list(hospitals)

        def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
            for name, asked in instructions:
                if late and name == "b" and asked.kind == "round":
                    yield Reply(site=name, round=asked.round, refusal="late", answered=60.0)
                else:
                    seconds = 1.0 if name == "a" else 2.0
                    yield replace(answer(hospitals[name], asked), answered=seconds)

    outcome = run_study(study, Timed(), seed=1)
    trained = [r for r in outcome.records if r.trained]
    assert [r.answered for r in trained] == [{"a": 1.0, "b": 60.0 if late else 2.0}] * 2
