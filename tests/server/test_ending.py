"""Training ends early by the study's rule or on request, and all figures say after what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medfl.client.hospital import Hospital, answer
from medfl.common.errors import ConfigError
from medfl.common.messages import Instruction, Reply
from medfl.common.study import Study
from medfl.common.tensors import Tensors, digest
from medfl.server.checkpoint import Checkpoint
from medfl.server.ending import Ending, sentence
from medfl.server.records import Best, RoundRecord
from medfl.server.rounds import Earlier, Outcome, run_study

MakeStudy = Callable[..., Study]
MakeHospital = Callable[..., Hospital]
# Of the models after 0, 1, 2, ... rounds. Model 2 is the best of the first six; 3 to 5 are no
# better (one is as good), so that with a patience of 3 round 6, which judges model 5, is the last.
COURSE = (0.5, 0.6, 0.7, 0.69, 0.7, 0.65, 0.2, 0.9)
STUDY = {"rounds": 20, "keep": "best", "best_metric": "accuracy", "patience": 3}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Here:
    """Two hospitals in this process, whose validation accuracy is as `course` has it."""

    def __init__(
        self,
        hospitals: Sequence[Hospital],
        course: Sequence[float] = COURSE,
        silent: Mapping[int, str] | None = None,
    ) -> None:
        self._hospitals = {h.name: h for h in hospitals}
        self._course, self._silent = course, silent or {}
        self.asked: list[Instruction] = []

    def names(self) -> list[str]:
        return list(self._hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for name, asked in instructions:
            self.asked.append(asked)
            if asked.kind == "round" and self._silent.get(asked.round) == name:
                yield Reply(site=name, round=asked.round, refusal="no answer")
                continue
            reply = answer(self._hospitals[name], asked)
            model = asked.round - (asked.kind == "round")
            if "validation" in asked.parts and model < len(self._course):
                metrics = {**reply.metrics, "validation": {"accuracy": self._course[model]}}
                reply = replace(reply, metrics=metrics)
            yield reply


@pytest.fixture
def run(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> Callable[..., tuple[Outcome, Here]]:
    def make(
        federation: Mapping[str, Any] = STUDY,
        where: str = "run",
        sites: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> tuple[Outcome, Here]:
        study = risk_study(federation=dict(federation))
        made = [risk_hospital(study, tmp_path / where, name=name) for name in "ab"]
        here = Here(made, **(sites or {}))
        return run_study(study, here, seed=1, **more), here

    return make


Run = Callable[..., tuple[Outcome, Here]]


def rounds_trained(outcome: Outcome) -> list[int]:
    return [record.round for record in outcome.records if record.trained]


def test_training_ends_after_so_many_models_that_are_no_better(run: Run) -> None:
    seen: list[Tensors] = []
    outcome, here = run(on_round=lambda record, weights: seen.append(weights))
    assert rounds_trained(outcome) == [1, 2, 3, 4, 5, 6]
    assert outcome.ending == Ending(6, "no better")
    assert outcome.selected_round == 2
    assert digest(outcome.weights) == digest(seen[1])
    assert digest(outcome.last) == digest(seen[5])
    assert [a.parts for a in here.asked[-4::2]] == [("validation",), ("validation", "test")]
    assert here.asked[-4].round == 6


def test_the_model_of_the_last_round_is_judged_and_may_be_the_best(run: Run) -> None:
    outcome, _ = run(sites={"course": (*COURSE[:6], 0.95)})
    assert outcome.ending == Ending(6, "no better")
    assert outcome.selected_round == 6


def test_a_study_without_patience_trains_all_rounds(run: Run) -> None:
    outcome, _ = run({**STUDY, "patience": None, "rounds": 7})
    assert rounds_trained(outcome) == [1, 2, 3, 4, 5, 6, 7]
    assert outcome.ending == Ending(7)


def test_the_rule_that_would_end_with_the_last_round_ends_nothing_early(run: Run) -> None:
    outcome, _ = run({**STUDY, "rounds": 6})
    assert outcome.ending == Ending(6)


def test_a_void_round_is_not_held_against_the_model_that_it_left(run: Run) -> None:
    """Round 4 is void: round 5 judges the same model again, which says nothing new."""
    course = (0.5, 0.6, 0.7, 0.69, 0.69, 0.68, 0.67, 0.9)
    outcome, _ = run({**STUDY, "min_sites": 2}, sites={"course": course, "silent": {4: "b"}})
    assert [r.void for r in outcome.records if r.round == 4] == [True]
    assert outcome.ending == Ending(7, "no better")


def test_rounds_that_cannot_be_compared_do_not_count() -> None:
    best = Best("accuracy").or_this(0, told(a=0.5, b=0.5, c=0.5), {})
    worse = best.or_this(1, told(a=0.4, b=0.4, c=0.4), {})
    assert worse.no_better == 1
    assert worse.or_this(2, told(a=0.4), {}).no_better == 1  # one of three hospitals
    assert worse.or_this(2, told(a=None), {}).no_better == 1
    assert worse.or_this(2, told(a=0.6, b=0.6, c=0.6), {}).no_better == 0


def told(**accuracy: float | None) -> list[dict[str, Any]]:
    return [{"name": name, "metrics": {"accuracy": value}} for name, value in accuracy.items()]


@pytest.mark.parametrize("after", [3, 5, 6])
def test_a_run_that_was_interrupted_ends_after_the_same_round(run: Run, after: int) -> None:
    kept: list[Checkpoint] = []
    whole, _ = run(keep=kept.append)
    records = [r for r in whole.records if r.trained and r.round <= after]
    earlier = Earlier(kept[after - 1], records)
    again, _ = run(earlier=earlier, attempt=1)
    assert again.ending == whole.ending == Ending(6, "no better")
    assert digest(again.weights) == digest(whole.weights)


def test_a_person_may_end_the_training_and_has_its_test_metrics(run: Run) -> None:
    done: list[RoundRecord] = []
    outcome, here = run(
        {"rounds": 20},
        on_round=lambda record, weights: done.append(record),
        enough=lambda: len(done) >= 4,
    )
    assert outcome.ending == Ending(4, "asked")
    assert outcome.selected_round == 4
    assert here.asked[-1].parts == ("validation", "test")
    assert here.asked[-1].round == 4
    assert [record.trained for record in done] == [True, True, True, True, False]


def test_a_mean_of_models_that_were_not_trained_is_the_last_model(run: Run) -> None:
    done: list[RoundRecord] = []
    outcome, _ = run(
        {"rounds": 20, "keep": "average"},
        on_round=lambda record, weights: done.append(record),
        enough=lambda: len(done) >= 4,
    )
    assert outcome.selected_round == 4
    assert digest(outcome.weights) == digest(outcome.last)


def test_the_words_say_after_which_round_and_why(risk_study: MakeStudy) -> None:
    how = risk_study(federation=STUDY).federation
    assert sentence(Ending(20), how) == ""
    assert sentence(Ending(6, "no better"), how) == (
        "training ended after round 6 of 20: 3 models in a row had no better accuracy on "
        "validation cases (patience)"
    )
    assert "round 4 of 20, because a person" in sentence(Ending(4, "asked"), how)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"federation": {"rounds": 9, "patience": 2}}, "patience: needs federation.best_metric"),
        (
            {"federation": {**STUDY, "keep": "last"}, "evaluation": {"validation": 0.0}},
            "patience: evaluation.validation is 0",
        ),
        ({"federation": {**STUDY, "keep": "average"}}, 'patience: keep = "average" is the mean'),
        ({"federation": {**STUDY, "patience": 20}}, "patience: must be below federation.rounds"),
        (
            {"federation": STUDY, "privacy": {"epsilon": 1.0, "delta": 1e-3}},
            "best_metric: no private hospital reports metrics",
        ),
    ],
)
def test_a_rule_that_could_not_be_followed_is_refused(
    risk_study: MakeStudy, tables: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        risk_study(**tables)


def test_a_study_that_states_no_patience_keeps_its_digest(risk_study: MakeStudy) -> None:
    """Computed before the key was there."""
    assert risk_study().digest == "f6ffdfa1a9f9ddd8fd8c7e7ee1ccd2a849da85350cc48e12f02f6163175b2198"
    assert (
        risk_study(federation=STUDY).digest
        != risk_study(federation={**STUDY, "patience": 4}).digest
    )
