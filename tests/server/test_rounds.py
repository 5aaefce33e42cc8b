"""The coordinator's rounds with real hospitals in this process, by hand where that can be done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medfl.client import home
from medfl.client.hospital import Hospital, answer
from medfl.common.errors import FederationError, MedflError
from medfl.common.messages import Instruction, Reply, refusal
from medfl.common.seeds import derive
from medfl.common.study import Study
from medfl.common.tensors import Tensors, digest
from medfl.server.checkpoint import Checkpoint
from medfl.server.records import Best
from medfl.server.rounds import Outcome, draw, run_study
from medfl.strategies.catalogue import study_faults

MakeStudy = Callable[..., Study]
MakeHospital = Callable[..., Hospital]
Numbers = np.ndarray[Any, Any]
W, B = "1.weight", "1.bias"
XS = {"a": (-1.0, 1.0, 2.0), "b": (-3.0, 0.5), "c": (0.2, -0.7, 1.5, 4.0)}
YS = {"a": (0, 1, 1), "b": (1, 0), "c": (0, 0, 1, 1)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Here:
    """Hospitals in this process; `spoil` may change a reply on its way."""

    def __init__(
        self,
        hospitals: Sequence[Hospital],
        spoil: Callable[[Instruction, Reply], Reply] = lambda asked, reply: reply,
    ) -> None:
        self._hospitals = {f"node {i}": h for i, h in enumerate(hospitals)}
        self._spoil = spoil
        self.asked: list[tuple[str, Instruction]] = []

    def names(self) -> list[str]:
        return list(self._hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for address, asked in instructions:
            hospital = self._hospitals[address]
            self.asked.append((hospital.name, asked))
            try:
                reply = answer(hospital, asked)
            except MedflError as error:
                reply = refusal(hospital.name, error, asked.round)
            yield self._spoil(asked, reply)


@pytest.fixture
def sites(risk_hospital: MakeHospital, tmp_path: Path) -> Callable[..., Here]:
    def make(study: Study, names: str = "abc", spoil: Any = None, **more: Any) -> Here:
        made = [
            risk_hospital(study, tmp_path / study.digest[:8], XS[n], YS[n], name=n, **more)
            for n in names
        ]
        return Here(made) if spoil is None else Here(made, spoil)

    return make


def gradient(p: Numbers, name: str) -> Numbers:
    x, y = np.array(XS[name]), np.array(YS[name])
    error = 1 / (1 + np.exp(-(p[0] * x + p[1]))) - y
    return np.array([np.mean(error * x), np.mean(error)])


def parameters(weights: Mapping[str, Numbers]) -> Numbers:
    return np.array([weights[W][0, 0], weights[B][0]], dtype=np.float64)


def trained_on(outcome: Outcome) -> list[list[str]]:
    return [[s["name"] for s in record.sites] for record in outcome.records]


# --- by hand -----------------------------------------------------------------------------------


def test_fedavg_by_hand(risk_study: MakeStudy, sites: Callable[..., Here]) -> None:
    study = risk_study(federation={"rounds": 3})
    outcome = run_study(study, sites(study), seed=1)
    x = np.zeros(2)
    for _ in range(3):
        ends = []
        for name in "abc":
            y = x
            for _ in range(2):
                y = y - 0.5 * gradient(y, name)
            ends.append(y)
        x = np.average(ends, axis=0, weights=[3, 2, 4])
    assert parameters(outcome.weights) == pytest.approx(x, rel=1e-5)


def scaffold_by_hand(drawn: list[list[str]], steps: int, eta: float) -> Numbers:
    """Karimireddy et al. 2020, Algorithm 1 with option II and global step size 1."""
    x, c = np.zeros(2), np.zeros(2)
    own = {name: np.zeros(2) for name in "abc"}
    for names in drawn:
        moves, changes = [], []
        for name in names:
            y = x.copy()
            for _ in range(steps):
                y = y - eta * (gradient(y, name) - own[name] + c)
            after = own[name] - c + (x - y) / (steps * eta)
            moves.append(y - x)
            changes.append(after - own[name])
            own[name] = after
        x = x + np.mean(moves, axis=0)
        c = c + len(names) / 3 * np.mean(changes, axis=0)
    return x


@pytest.mark.parametrize(("names", "drawn"), [("abc", None), ("abc", 2), ("abc", 1)])
def test_scaffold_equals_the_papers_algorithm(
    risk_study: MakeStudy, sites: Callable[..., Here], names: str, drawn: int | None
) -> None:
    study = risk_study(
        training={"local_steps": 3},
        federation={
            "rounds": 6,
            "strategy": "scaffold",
            "weighting": "equal",
            "sites_per_round": drawn,
        },
    )
    outcome = run_study(study, sites(study, names), seed=4)
    rounds = trained_on(outcome)
    if drawn is not None:
        assert [len(r) for r in rounds] == [drawn] * 6
        assert len({tuple(r) for r in rounds}) > 1
    expected = scaffold_by_hand(rounds, steps=3, eta=0.5)
    assert parameters(outcome.weights) == pytest.approx(expected, rel=1e-4)


def test_scaffold_differs_from_fedavg(risk_study: MakeStudy, sites: Callable[..., Here]) -> None:
    found = {}
    for name in ("fedavg", "scaffold"):
        study = risk_study(federation={"rounds": 4, "strategy": name, "weighting": "equal"})
        found[name] = parameters(run_study(study, sites(study), seed=4).weights)
    assert not np.allclose(found["fedavg"], found["scaffold"], rtol=1e-3)


def test_what_all_share_is_made_of_all_training_records(
    risk_study: MakeStudy, sites: Callable[..., Here]
) -> None:
    study = risk_study(record={"scale": "federated"})
    shared = run_study(study, sites(study), seed=1).shared
    everything = [x for xs in XS.values() for x in xs]
    assert shared.means["x"] == pytest.approx(np.mean(everything))
    assert shared.sds["x"] == pytest.approx(np.std(everything, ddof=1))


def test_a_hospital_in_another_unit_is_named_from_the_sums_of_prepare(
    risk_study: MakeStudy, sites: Callable[..., Here], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(asked: Instruction, reply: Reply) -> Reply:
        if asked.kind != "prepare" or reply.site != "b":
            return reply
        x = {"n": 9.0, "total": 9000.0, "squares": 9e6 + 18.0}  # 1000 +- 1.5
        return replace(reply, statistics={**reply.statistics, "features": {"x": x}})

    study = risk_study(record={"scale": "federated"})
    outcome = run_study(study, sites(study, spoil=spoil), seed=1)
    said = "x: a mean far from the other hospitals'; in the same unit?"
    assert outcome.unlike["b"] == (said,)
    assert f"site=b is unlike the others: {said}" in caplog.text


def test_the_loss_of_a_round_counts_cases(
    risk_study: MakeStudy, sites: Callable[..., Here]
) -> None:
    study = risk_study(training={"local_steps": 1}, federation={"rounds": 1})
    record = run_study(study, sites(study), seed=1).records[0]
    # Every probability is 1/2 at zero weights; four decimals leave a hospital.
    assert record.loss == pytest.approx(np.log(2), abs=5e-5)
    assert record.bytes_up == 3 * 8
    assert record.bytes_down == 3 * 8


# --- the same again ----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_one_others(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(training={"batch_size": 1, "local_steps": 3})

    def run(seed: int, where: str) -> str:
        made = [risk_hospital(study, tmp_path / where, XS[n], YS[n], name=n) for n in "abc"]
        return digest(run_study(study, Here(made), seed=seed).weights)

    assert run(1, "one") == run(1, "two")
    assert run(1, "three") != run(2, "four")


def test_the_order_in_which_hospitals_are_listed_does_not_matter(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(federation={"rounds": 3})
    found = []
    for order in ("abc", "cab"):
        made = [risk_hospital(study, tmp_path / order, XS[n], YS[n], name=n) for n in order]
        found.append(digest(run_study(study, Here(made), seed=1).weights))
    assert found[0] == found[1]


def test_sites_are_drawn_without_replacement_and_in_order() -> None:
    names = [f"{i}" for i in range(9)]
    assert draw(names, None, 1) == draw(names, 9, 1) == draw(names, 20, 1) == names
    drawn = [draw(names, 4, derive(1, "draw", r)) for r in range(300)]
    assert all(len(set(d)) == 4 and d == sorted(d) for d in drawn)
    counts = [sum(n in d for d in drawn) for n in names]
    assert min(counts) > 90  # expected 133


class Late(Here):
    """Hospital c is connected from the second round on, or answers `prepare` late once."""

    def __init__(self, hospitals: Sequence[Hospital], late: bool = False) -> None:
        super().__init__(hospitals)
        self._late = late

    def names(self) -> list[str]:
        there = any(asked.kind == "round" for _, asked in self.asked)
        return [a for a in super().names() if there or self._late or a != "node 2"]

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for address, asked in instructions:
            if self._late and address == "node 2" and asked.kind == "prepare":
                self._late = False
                yield Reply(site=address, refusal="late")
            else:
                yield from super().ask([(address, asked)])


@pytest.mark.parametrize("late", [False, True])
def test_who_was_not_there_for_prepare_joins_at_the_next_round(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path, late: bool
) -> None:
    """As it was: out of all rounds."""
    study = risk_study(federation={"rounds": 3})
    made = [risk_hospital(study, tmp_path, XS[n], YS[n], name=n) for n in "abc"]
    kept: list[Checkpoint] = []
    sites = Late(made, late)
    outcome = run_study(study, sites, seed=1, keep=kept.append)
    assert trained_on(outcome)[:3] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert outcome.refused == {}
    assert list(kept[0].prepared.roster) == ["a", "b"]
    assert dict(kept[1].prepared.cases) == {"a": 3, "b": 2, "c": 4}


def test_nobody_joins_a_secure_sum_or_a_sampling_that_began_without(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(
        federation={"rounds": 2, "min_sites": 2, "weighting": "equal"},
        site_privacy={"epsilon": 8.0, "delta": 1e-3, "clip": 1.0, "sites": 3},
    )
    made = [risk_hospital(study, tmp_path, XS[n], YS[n], name=n) for n in "abc"]
    outcome = run_study(study, Late(made), seed=1)
    assert trained_on(outcome)[:2] == [["a", "b"], ["a", "b"]]


# --- the best model ----------------------------------------------------------------------------


def test_the_best_is_the_first_of_equals_and_knows_the_direction() -> None:
    high = Best("auroc").or_this(1, told("auroc", a=0.5), {}).or_this(2, told("auroc", a=0.5), {})
    assert high.or_this(3, told("auroc", a=0.4), {}).round == 1
    assert high.or_this(3, told("auroc", a=0.6), {}).round == 3
    assert high.or_this(3, told("auroc", a=None), {}).round == 1
    low = Best("brier").or_this(1, told("brier", a=0.5), {})
    assert low.or_this(2, told("brier", a=0.6), {}).round == 1
    assert low.or_this(2, told("brier", a=0.4), {}).round == 2
    assert Best(None).or_this(1, told("auroc", a=1.0), {}).value is None


def told(metric: str, **values: float | None) -> list[dict[str, Any]]:
    """What hospitals told in a round, as its record has it."""
    return [{"name": name, "metrics": {metric: value}} for name, value in values.items()]


def test_rounds_are_compared_over_the_hospitals_that_both_have() -> None:
    """The means are .6, then .8 without the hard hospital, whose others fell from .9 to .8."""
    first = Best("auroc").or_this(1, told("auroc", easy=0.9, other=0.9, hard=0.0), {})
    assert first.value == pytest.approx(0.6)
    without = first.or_this(2, told("auroc", easy=0.8, other=0.8), {})
    assert without.round == 1
    assert first.or_this(2, told("auroc", easy=0.95, other=0.9), {}).round == 2
    assert first.or_this(2, told("auroc", easy=0.99, other=None, hard=None), {}).round == 1
    assert first.or_this(2, told("auroc", easy=0.8, other=0.8, hard=0.5), {}).round == 2
    alone = Best("auroc").or_this(1, told("auroc", easy=0.9), {})
    assert alone.or_this(2, told("auroc", hard=0.95), {}).round == 1
    assert alone.or_this(2, told("auroc", easy=0.95, hard=0.1), {}).round == 2


def spoiled_after(round_: int, metric: str) -> Callable[[Instruction, Reply], Reply]:
    """Validation says that the model after `round_` rounds is the best."""

    def spoil(asked: Instruction, reply: Reply) -> Reply:
        trained = asked.round - 1 if asked.kind == "round" else asked.round
        return replace(reply, metrics={"validation": {metric: float(trained == round_)}})

    return spoil


@pytest.mark.parametrize("best", [0, 2, 3])
def test_the_best_rounds_model_is_kept(
    risk_study: MakeStudy, sites: Callable[..., Here], best: int
) -> None:
    federation = {"rounds": 3, "keep": "best", "best_metric": "accuracy"}
    study = risk_study(federation=federation)
    seen = []
    outcome = run_study(
        study,
        sites(study, spoil=spoiled_after(best, "accuracy")),
        seed=1,
        on_round=lambda record, weights: seen.append(weights),
    )
    assert outcome.selected_round == best
    expected = np.zeros(2) if best == 0 else parameters(seen[best - 1])
    assert np.array_equal(parameters(outcome.weights), expected)
    assert np.array_equal(parameters(outcome.last), parameters(seen[2]))


def test_a_best_round_without_any_validation_case_is_refused(
    risk_study: MakeStudy, sites: Callable[..., Here]
) -> None:
    study = risk_study(federation={"keep": "best", "best_metric": "auroc"})
    with pytest.raises(FederationError, match="no hospital can measure auroc on its validation"):
        run_study(study, sites(study), seed=1)


def test_a_sites_own_layers_of_the_best_round_serve_at_the_end(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    federation = {"rounds": 4, "keep": "best", "best_metric": "accuracy", "strategy": "local"}
    study = risk_study(federation=federation, evaluation={"metrics": ["accuracy", "brier"]})
    parts = ["train"] * 3 + ["test"]
    here = [
        risk_hospital(study, tmp_path, [-1, 1, 2, 1], [0, 1, 1, 1], parts, name=n) for n in "ab"
    ]
    seen: dict[int, float | None] = {}

    def spoil(asked: Instruction, reply: Reply) -> Reply:
        if "test" in asked.parts:
            seen[asked.round] = reply.metrics["test"]["brier"]
        return spoiled_after(2, "accuracy")(asked, reply)

    outcome = run_study(study, Here(here, spoil), seed=1)
    assert outcome.selected_round == 2
    own = parameters(home.layers(here[0].state).as_of(2))
    assert seen == {2: pytest.approx((1 - 1 / (1 + np.exp(-own.sum()))) ** 2, abs=1e-4)}


@pytest.mark.parametrize(("rounds", "first"), [(1, 1), (4, 3), (5, 3)])
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_the_mean_of_the_later_models_is_kept(
    risk_study: MakeStudy, sites: Callable[..., Here], rounds: int, first: int, strategy: str
) -> None:
    study = risk_study(federation={"rounds": rounds, "keep": "average", "strategy": strategy})
    seen: list[Tensors] = []
    here = sites(study)
    outcome = run_study(study, here, seed=1, on_round=lambda record, weights: seen.append(weights))
    later = [parameters(weights) for weights in seen[first - 1 : rounds]]
    assert parameters(outcome.weights) == pytest.approx(np.mean(later, axis=0), rel=1e-6)
    assert np.array_equal(parameters(outcome.last), parameters(seen[rounds - 1]))
    # The mean is what hospitals judge, and it leaves no trace in the training.
    plain = risk_study(federation={"rounds": rounds, "strategy": strategy})
    last = run_study(plain, sites(plain), seed=1)
    assert digest(outcome.last) == digest(last.weights)
    judged = here.asked[-1][1]
    assert (judged.kind, judged.model) == ("finish", digest(outcome.weights))


def test_a_void_round_counts_with_the_model_that_it_left(
    risk_study: MakeStudy, sites: Callable[..., Here]
) -> None:
    def fails(asked: Instruction, reply: Reply) -> Reply:
        bad = asked.kind == "round" and asked.round == 4
        return replace(reply, delta=NAN) if bad else reply

    study = risk_study(federation={"rounds": 4, "keep": "average"})
    seen: list[Tensors] = []
    outcome = run_study(
        study,
        sites(study, spoil=fails),
        seed=1,
        on_round=lambda record, weights: seen.append(weights),
    )
    assert outcome.records[3].void
    assert parameters(outcome.weights) == pytest.approx(parameters(seen[2]), rel=1e-6)


def test_a_mean_is_refused_where_models_have_none(risk_study: MakeStudy) -> None:
    study = risk_study(federation={"keep": "average", "strategy": "local"})
    assert [f for f in study_faults(study) if f.startswith("federation.keep: local leaves layers")]


# --- what goes wrong ---------------------------------------------------------------------------


def spoil_b(**changes: Any) -> Callable[[Instruction, Reply], Reply]:
    def spoil(asked: Instruction, reply: Reply) -> Reply:
        return replace(reply, **changes) if reply.site == "b" and asked.kind == "round" else reply

    return spoil


NAN = {W: np.full((1, 1), np.nan, dtype=np.float32), B: np.zeros(1, dtype=np.float32)}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"delta": NAN}, "value that is not finite"),
        ({"delta": {**NAN, W: np.zeros((2, 1), dtype=np.float32)}}, "parameter of another shape"),
        ({"n_cases": 10**15}, "case count out of range"),
        ({"delta": {}}, "missing parameter"),
        ({"site": "a"}, "answer to another question"),
        ({"round": 99}, "answer to another question"),
        ({"refusal": "node failed", "site": "node 7"}, "node failed"),
    ],
)
def test_a_bad_update_costs_its_site_the_round_and_nobody_else(
    risk_study: MakeStudy, sites: Callable[..., Here], changes: dict[str, Any], why: str
) -> None:
    study = risk_study(federation={"rounds": 2})
    outcome = run_study(study, sites(study, spoil=spoil_b(**changes)), seed=1)
    assert [r.left_out for r in outcome.records] == [{"b": why}] * 2
    assert [r.void for r in outcome.records] == [False, False]
    assert {r.site for r in outcome.final} == {"a", "b", "c"}
    x = np.zeros(2)
    for _ in range(2):
        ends = []
        for name in "ac":
            y = x
            for _ in range(2):
                y = y - 0.5 * gradient(y, name)
            ends.append(y)
        x = np.average(ends, axis=0, weights=[3, 4])
    assert parameters(outcome.weights) == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("told", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_or_loss_that_is_not_finite_counts_as_not_told(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path, told: float
) -> None:
    def spoil(asked: Instruction, reply: Reply) -> Reply:
        if reply.site != "b" or asked.kind == "prepare":
            return reply
        metrics = {part: {**m, "accuracy": told} for part, m in reply.metrics.items()}
        return replace(reply, metrics=metrics, loss=told)

    federation = {"rounds": 2, "keep": "best", "best_metric": "accuracy"}
    study = risk_study(federation=federation, evaluation={"metrics": ["accuracy"]})
    parts = ["train", "train", "validation", "test"]
    here = [
        risk_hospital(study, tmp_path, [-1, 1, 2, 1], [0, 1, 1, 1], parts, name=n) for n in "ab"
    ]
    outcome = run_study(study, Here(here, spoil), seed=1)
    for record in outcome.records:
        own = {site["name"]: site for site in record.sites}
        assert own["b"]["metrics"]["accuracy"] is None
        assert own["b"]["loss"] is None
        assert record.metrics["accuracy"] == own["a"]["metrics"]["accuracy"] is not None
    assert [r.metrics["test"]["accuracy"] for r in outcome.final if r.site == "b"] == [None]


def test_a_void_round_changes_nothing_and_names_who_was_missing(
    risk_study: MakeStudy, sites: Callable[..., Here]
) -> None:
    def spoil(asked: Instruction, reply: Reply) -> Reply:
        failed = asked.kind == "round" and asked.round == 2 and reply.site in "bc"
        return Reply(site="?", round=2, refusal="no answer") if failed else reply

    study = risk_study(federation={"rounds": 2, "min_sites": 2})
    weights = []
    outcome = run_study(
        study, sites(study, spoil=spoil), seed=1, on_round=lambda r, w: weights.append(digest(w))
    )
    assert [r.void for r in outcome.records] == [False, True]
    assert outcome.records[1].left_out == {"b": "no answer", "c": "no answer"}
    assert weights[0] == weights[1] == digest(outcome.weights)


def test_only_void_rounds_are_an_error(risk_study: MakeStudy, sites: Callable[..., Here]) -> None:
    study = risk_study(federation={"min_sites": 3})
    with pytest.raises(FederationError, match=r"None of 2 rounds.*b \(value that is not finite\)"):
        run_study(study, sites(study, spoil=spoil_b(delta=NAN)), seed=1)


def test_too_few_sites_are_an_error_that_names_the_others(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    from medfl.common.site import Policy

    study = risk_study(federation={"min_sites": 2})
    made = [
        risk_hospital(study, tmp_path, name="a"),
        risk_hospital(study, tmp_path, name="b", policy=Policy(min_cases=9)),
    ]
    with pytest.raises(FederationError, match=r"1 of 2 .* b \(not allowed by the hospital's"):
        run_study(study, Here(made), seed=1)


def test_a_site_that_refuses_is_not_asked_again(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    from medfl.common.site import Policy

    study = risk_study()
    made = [
        risk_hospital(study, tmp_path, name="a"),
        risk_hospital(study, tmp_path, name="b", policy=Policy(min_cases=9)),
    ]
    here = Here(made)
    outcome = run_study(study, here, seed=1)
    assert outcome.refused == {"b": "not allowed by the hospital's policy"}
    assert [asked.kind for name, asked in here.asked if name == "b"] == ["prepare"]


def test_two_sites_of_one_name_are_told_apart(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study()
    made = [risk_hospital(study, tmp_path / str(i), name="a") for i in range(2)]
    outcome = run_study(study, Here(made), seed=1)
    assert outcome.refused == {"a": "two sites have this name"}
    assert len(outcome.final) == 1


@pytest.mark.parametrize("statistics", [{}, {"n_cases": 3}, {"features": 5}, {"secret": 1}])
def test_statistics_that_make_no_sense_cost_their_site_the_run(
    risk_study: MakeStudy, sites: Callable[..., Here], statistics: dict[str, Any]
) -> None:
    def spoil(asked: Instruction, reply: Reply) -> Reply:
        bad = asked.kind == "prepare" and reply.site == "b"
        return replace(reply, statistics=statistics) if bad else reply

    study = risk_study()
    outcome = run_study(study, sites(study, spoil=spoil), seed=1)
    assert outcome.refused == {"b": "statistics that cannot be read"}
    assert {r.site for r in outcome.final} == {"a", "c"}


def test_a_model_that_nobody_can_evaluate_is_an_error(
    risk_study: MakeStudy, sites: Callable[..., Here], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    def spoil(asked: Instruction, reply: Reply) -> Reply:
        return replace(reply, refusal="node failed") if asked.kind == "finish" else reply

    study = risk_study()
    with pytest.raises(FederationError, match="No site could evaluate"):
        run_study(study, sites(study, spoil=spoil), seed=1)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam"])
def test_no_instruction_carries_what_a_site_said_alone(
    risk_study: MakeStudy, sites: Callable[..., Here], name: str
) -> None:
    study = risk_study(record={"scale": "federated"}, federation={"strategy": name})
    here = sites(study)
    run_study(study, here, seed=1)
    own_means = {float(np.mean(xs)) for xs in XS.values()}
    for _, asked in here.asked:
        assert asked.study_digest == study.digest
        assert not own_means & set(asked.shared.get("means", {}).values())


def test_a_hospital_that_pulls_against_the_rest_stands_out_in_the_record(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    """Three hospitals whose outcome rises with x, and a fourth that sends its update turned round.

    Its length is as the others', so that no bound on lengths finds it.
    """

    def turned(asked: Instruction, reply: Reply) -> Reply:
        if asked.kind != "round" or reply.site != "d":
            return reply
        return replace(reply, delta={n: -d for n, d in reply.delta.items()})

    def hospitals(where: str) -> list[Hospital]:
        xs = {"a": (-1.0, 1.0, 2.0), "b": (-2.0, 0.5, 1.0), "c": (-0.5, 0.7), "d": (-1.5, 1.5)}
        return [
            risk_hospital(study, tmp_path / where, x, tuple(int(v > 0) for v in x), name=name)
            for name, x in xs.items()
        ]

    study = risk_study(federation={"rounds": 3})
    spoilt = run_study(study, Here(hospitals("one"), turned), seed=1, noise_key=b"k" * 32)
    for record in spoilt.records[:3]:
        own = {site["name"]: site for site in record.sites}
        assert own["d"]["cosine"] < -0.5
        assert min(own[n]["cosine"] for n in "abc") > 0.5
        assert own["d"]["length"] < 3 * own["a"]["length"]
    honest = run_study(study, Here(hospitals("two")), seed=1, noise_key=b"k" * 32)
    assert all(s["cosine"] > 0.5 for r in honest.records[:3] for s in r.sites)
