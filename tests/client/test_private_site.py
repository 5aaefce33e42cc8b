"""A private hospital: what it answers, what it refuses, and what it writes down before it works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client import budget, home
from medfl.client.cli import main
from medfl.client.composition import spent
from medfl.client.data.check import check_with_cohort
from medfl.client.data.cohort import build_cohort
from medfl.client.hospital import Hospital, answer
from medfl.client.ledger import Ledger
from medfl.common import accounting, config
from medfl.common.errors import BudgetSpent, ConfigError, FederationError, PolicyRefused
from medfl.common.messages import Instruction, Reply, pack
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.site import Budget, Policy, SitePrivacy, load_site
from medfl.common.source import DataSource
from medfl.common.statistics import Shared, statistics_to_plain
from medfl.common.study import Study
from medfl.common.tensors import digest
from medfl.server.rounds import run_study

STUDY: dict[str, Any] = {
    "name": "ages",
    "task": {"kind": "risk", "classes": ["well", "ill"]},
    "record": {"features": [{"name": "age", "range": [0, 100]}], "scale": "range"},
    "model": {"name": "logistic"},
    "training": {"learning_rate": 0.5, "local_steps": 2, "batch_size": 8},
    "federation": {"rounds": 3},
    "evaluation": {"split": "given", "bootstrap": 0},
    "privacy": {"epsilon": 2.0, "delta": 1e-3, "sample_rate": 0.5},
    "quality": {"min_cases": 1},
}
DECLARED = SitePrivacy(epsilon=2.0, delta=1e-3, declared_patients=25, declared_cases=30)


def study_of(**tables: dict[str, Any] | None) -> Study:
    raw: dict[str, Any] = {**STUDY, **tables}
    return config.parse({k: v for k, v in raw.items() if v is not None}, Study, "study.toml")


def table(n_patients: int = 20, first: int = 0) -> str:
    """Patient i has 1 + i % 3 records; a quarter each validate and test."""
    lines = ["case,patient,age,label,split"]
    for i in range(first, first + n_patients):
        part = ["train", "train", "validation", "test"][i % 4]
        label = ["well", "ill"][i // 4 % 2]
        age = 30 + i % 10 + 30 * (label == "ill")
        lines += [f"{i}-{k},p{i},{age + k},{label},{part}" for k in range(1 + i % 3)]
    return "\n".join(lines) + "\n"


def source_of(folder: Path, text: str) -> DataSource:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.csv").write_text(text)
    return DataSource(format="table", path=folder / "cases.csv", columns={"case": "case"})


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Hospital]:
    """make_site("name", study, privacy=..., text=..., simulated=...): with one ledger a name."""

    def make(
        name: str = "st-anna",
        study: Study | None = None,
        privacy: SitePrivacy | None = DECLARED,
        text: str | None = None,
        run: str = "run",
        **more: Any,
    ) -> Hospital:
        study = study or study_of()
        source = source_of(tmp_path / name / run, text or table())
        return Hospital(
            name=name,
            study=study,
            load_cohort=lambda: build_cohort(source, study, cache=None),
            folder=tmp_path / name / run / "out",
            privacy=privacy,
            ledger_folder=tmp_path / name / "ledger",
            **more,
        )

    return make


def asked(site: Hospital, kind: str = "round", round_: int = 1, **more: Any) -> Instruction:
    shared = Shared(private=True)
    return Instruction(
        kind=kind,  # type: ignore[arg-type]
        study_digest=site.study.digest,
        run="main",
        round=round_,
        seed=7,
        shared=statistics_to_plain(shared) if kind != "prepare" else {},
        parts=more.pop("parts", () if kind == "prepare" else ("validation",)),
        weights=initial_weights(site.study, shared, 7) if kind != "prepare" else {},
        **more,
    )


def initial_weights(study: Study, shared: Shared, seed: int) -> dict[str, Any]:
    return get_weights(build_model(study, shared, n_features=1, seed=seed))


class Direct:
    """Sites that are asked without a transport."""

    def __init__(self, sites: list[Hospital]) -> None:
        self._sites = {s.name: s for s in sites}

    def names(self) -> list[str]:
        return list(self._sites)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        for name, instruction in instructions:
            yield answer(self._sites[name], instruction)


def plain(reply: Reply) -> dict[str, Any]:
    """All that a coordinator reads in an answer, except the noisy arrays and the time."""
    said = json.loads(pack(reply).about)
    said.pop("seconds")
    return {**said, "shapes": {n: a.shape for n, a in reply.delta.items()}}


def test_an_answer_says_what_is_declared_and_nothing_that_was_counted(make_site) -> None:
    site = make_site()
    prepared, trained = answer(site, asked(site, "prepare")), answer(site, asked(site))
    finished = answer(site, asked(site, "finish", 3, parts=("validation", "test")))
    assert prepared.statistics["n_cases"] == prepared.n_cases == trained.n_cases == 30
    for reply in (prepared, trained, finished):
        assert (reply.counts, reply.left_out, reply.cohort, reply.loss) == ({}, {}, "", None)
        assert not any(reply.metrics.values())
    # The hospital itself, and a simulation's report, still know.
    assert (site.folder / "scores.npz").exists()
    facts = json.loads((site.folder / "cohort.json").read_text())
    assert facts["counts"] == {"train": 20, "validation": 10, "test": 9}
    assert facts["cohort"] == site.cohort.digest


def test_messages_are_the_same_with_one_patient_more(make_site) -> None:
    one, other = make_site("a", text=table(20)), make_site("b", text=table(21))
    for kind in ("prepare", "round", "finish"):
        said = [plain(replace(answer(s, asked(s, kind)), site="")) for s in (one, other)]
        assert said[0] == said[1]


def test_whether_it_takes_part_does_not_hang_on_one_patient_more(make_site) -> None:
    """It has 20 or 21 patients, declares 25 with 30 cases, and wants as many as it says."""
    few, more = (make_site(name, text=table(n)) for name, n in (("a", 20), ("b", 21)))
    for site in (few, more):
        fits = replace(site, policy=Policy(min_cases=30, smallest_count=25))
        assert answer(fits, asked(fits, "prepare", 0)).refusal == ""
        asks = replace(site, policy=Policy(min_cases=31))
        with pytest.raises(PolicyRefused, match="30 training cases"):
            answer(asks, asked(asks, "prepare", 0))


def test_noise_has_no_seed_unless_the_data_are_made_up(make_site) -> None:
    def trained(name: str, simulated: bool) -> str:
        site = make_site(name, simulated=simulated)
        return digest(answer(replace(site, name="x"), asked(site)).delta)

    assert trained("a", True) == trained("b", True)
    assert trained("c", False) != trained("d", False)


def test_a_round_asked_for_twice_is_charged_twice_and_has_other_noise(make_site) -> None:
    site = make_site(simulated=True)
    first, again = answer(site, asked(site)), answer(site, asked(site))
    assert digest(first.delta) != digest(again.delta)
    assert len(site.ledger.entries()) == 2
    assert again.epsilon == pytest.approx(budget.study_epsilon(site.ledger, site.study, site.terms))
    assert again.epsilon > first.epsilon


def test_a_hospital_that_declares_no_number_takes_no_part_but_a_simulation_counts(
    make_site,
) -> None:
    undeclared = SitePrivacy(epsilon=2.0, delta=1e-3)
    site = make_site(privacy=undeclared)
    with pytest.raises(PolicyRefused, match="declared_patients is missing"):
        answer(site, asked(site, "prepare"))
    with pytest.raises(PolicyRefused, match="declared_patients"):
        answer(site, asked(site))
    counted = make_site("b", privacy=undeclared, simulated=True)
    assert answer(counted, asked(counted, "prepare")).n_cases == 20
    assert counted.terms is not None
    assert counted.terms.n_units == 10  # patients with one to three records
    too_few = replace(DECLARED, declared_patients=1000)
    with pytest.raises(PolicyRefused, match="below one over"):
        answer(make_site("c", privacy=too_few), asked(site, "prepare"))


def test_statistics_without_noise_are_refused(make_site) -> None:
    open_levels = {"features": [{"name": "age", "kind": "category"}], "scale": "none"}
    with pytest.raises(ConfigError, match=r"privacy: record\.features .*each private hospital"):
        study_of(record=open_levels)
    # A study of open hospitals may compute them; one that is private by its own choice refuses.
    site = make_site(study=study_of(record=open_levels, privacy=None))
    with pytest.raises(PolicyRefused, match="levels of each category"):
        answer(site, asked(site, "prepare"))


def test_a_split_by_which_one_patient_moves_others_is_refused(make_site) -> None:
    shuffled = {"split": "shuffled", "bootstrap": 0}
    with pytest.raises(ConfigError, match=r'evaluation\.split \(write "hash"'):
        study_of(evaluation=shuffled)
    # An open study may; a hospital that is private by its own choice refuses. Folds go by a hash
    # whatever `split` says, and are served.
    site = make_site(study=study_of(evaluation=shuffled, privacy=None))
    with pytest.raises(PolicyRefused, match=r"evaluation\.split"):
        answer(site, asked(site, "prepare"))
    study_of(evaluation={**shuffled, "folds": 5})


@pytest.mark.parametrize("rule", [{"split": "hash"}, {"folds": 4}, {"split": "given"}])
def test_one_patient_more_moves_nobody_from_part_to_part(make_site, rule: dict[str, Any]) -> None:
    study = study_of(evaluation={**rule, "bootstrap": 0})
    parts = []
    for name, n in (("a", 40), ("b", 39)):
        site = make_site(name, study=study, text=table(n))
        parts.append({p: set(site.patients(p)) for p in ("train", "validation", "test")})
    for part, patients in parts[1].items():
        assert patients <= parts[0][part]
    assert (
        sum(len(p) for p in parts[0].values()) == 1 + sum(len(p) for p in parts[1].values()) == 40
    )


def test_metrics_of_training_patients_are_refused(make_site) -> None:
    site = make_site()
    with pytest.raises(PolicyRefused, match="training cases"):
        answer(site, asked(site, parts=("train",)))
    assert site.ledger.entries() == ()


def test_a_round_is_in_the_ledger_before_the_training_and_stays_there(
    make_site, monkeypatch
) -> None:
    from medfl.client.training import loop

    site, seen = make_site(), []

    def dies(*_: object) -> None:
        seen.append(Ledger(site.ledger.folder).entries())
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        answer(site, asked(site))
    assert [[e.settled for e in entries] for entries in seen] == [[False]]
    monkeypatch.undo()
    answer(site, asked(site))
    assert [e.settled for e in site.ledger.entries()] == [False, True]
    steps = sum(n for _, _, n in site.ledger.heaviest()[0])
    assert steps == 4


def test_rounds_restarts_and_studies_end_at_the_hospitals_budget(make_site) -> None:
    tight = replace(DECLARED, budget=Budget(epsilon=2.5, delta=1e-3))
    first = make_site(privacy=tight, run="first")
    answer(first, asked(first, "prepare"))
    for round_ in (1, 2, 3):
        answer(first, asked(first, round_=round_))
    # Another study on the same patients, in another folder: the ledger is the hospital's.
    second = make_site(study=study_of(name="again"), privacy=tight, run="second")
    with pytest.raises(
        BudgetSpent, match=r"allows 2\.50 ever.* of its 6 steps would fit"
    ) as caught:
        answer(second, asked(second, "prepare"))
    assert "or all 6 of them with an epsilon of" in str(caught.value)
    before = second.ledger.head()
    rounds = 0
    with suppress(BudgetSpent):
        for rounds in range(4):
            answer(second, asked(second, round_=rounds + 1))
    assert 1 <= rounds < 3  # the first still fitted, the last did not
    assert spent(second.ledger.heaviest(), 1e-3) <= 2.5
    assert second.ledger.head().lines == before.lines + 2 * rounds
    # Other patients of the same hospital have lost nothing.
    third = make_site(study=study_of(name="others"), privacy=tight, run="third",
                      text=table(20, first=40))  # fmt: skip
    answer(third, asked(third, "prepare"))


def test_one_study_alone_is_held_to_its_own_epsilon(make_site) -> None:
    site = make_site()
    for round_ in (1, 2, 3):
        reply = answer(site, asked(site, round_=round_))
    assert 1.97 <= (reply.epsilon or 0) <= 2.0
    with pytest.raises(BudgetSpent, match="epsilon of study ages"):
        answer(site, asked(site, round_=4))


def test_an_accountant_that_begins_anew_each_round_would_be_seen(make_site, monkeypatch) -> None:
    site = make_site()
    monkeypatch.setattr(budget, "_steps_of", lambda *_: [])
    for round_ in (1, 2, 3, 4):
        answer(site, asked(site, round_=round_))
    # The study's own check was deceived; the ledger was not.
    assert spent(site.ledger.heaviest(), 1e-3) > 2.0


PRICED = {**STUDY["privacy"], "metrics_epsilon": 4.0}


def test_metrics_with_a_price_are_noisy_and_charged_to_those_they_speak_of(make_site) -> None:
    site = make_site(study=study_of(privacy=PRICED), simulated=True)
    reply = answer(site, asked(site))
    assert set(reply.metrics["validation"]) >= {"accuracy", "auroc"}
    assert reply.metrics["validation"]["auroc"] is None
    metrics, training = site.ledger.entries()
    assert (metrics.charge.purpose, metrics.charge.sample_rate) == ("validation", 1.0)
    assert metrics.cohort != training.cohort
    one = (metrics.charge.noise_multiplier, 1.0, site.study.federation.rounds + 2)
    assert 3.9 <= accounting.epsilon([one], 1e-3) <= 4.0
    # Nobody is in both parts, so nobody pays for both.
    both = site.ledger.heaviest()
    assert sorted(len(history) for history in both) == [1, 1]


def test_the_best_round_is_not_chosen_by_metrics_that_stay_at_home(make_site) -> None:
    best = {"rounds": 2, "keep": "best", "best_metric": "accuracy"}
    open_study = study_of(privacy=None, federation=best)
    insists = make_site(study=open_study)
    with pytest.raises(FederationError, match="metrics_epsilon"):
        run_study(open_study, Direct([insists]), seed=1)
    priced = study_of(privacy=PRICED, federation=best)
    site = make_site("b", study=priced, simulated=True)
    assert run_study(priced, Direct([site]), seed=1).final


def test_a_whole_study_runs_with_an_open_and_a_private_hospital(make_site) -> None:
    study = study_of(privacy=None)
    sites = [make_site("a", study), make_site("b", study, privacy=None)]
    outcome = run_study(study, Direct(sites), seed=1)
    metrics = outcome.records[-1].metrics
    private, plain_one = outcome.records[-1].sites
    assert private["metrics"] == {}
    assert private["epsilon"] is not None
    assert plain_one["metrics"]["accuracy"] == metrics["accuracy"]
    assert outcome.records[-1].loss == plain_one["loss"]


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_a_private_hospital_without_a_training_patient_answers_as_with_one(
    make_site, model: str
) -> None:
    """As it was: an error, which told the coordinator of the last training patient's leaving."""
    study = study_of(model={"name": model}, privacy=PRICED)
    header, *rows = table().splitlines()
    nobody = "\n".join([header, *(r for r in rows if not r.endswith("train"))]) + "\n"
    one = "\n".join([nobody.strip(), next(r for r in rows if r.endswith("train"))]) + "\n"
    answers = []
    for name, text in (("nobody", nobody), ("one", one)):
        site = make_site(name, study, text=text)
        answer(site, asked(site, "prepare", 0))
        first, second = (answer(site, asked(site, round_=r)) for r in (1, 2))
        assert first.refusal == ""
        assert all(np.abs(a).max() > 0 for a in first.delta.values())
        answers.append((first.n_cases, first.steps, first.epsilon, second.epsilon, first.loss))
        assert set(first.delta) == set(second.delta)
    assert answers[0] == answers[1]


def write_site(folder: Path, privacy: str) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "cases.csv").write_text(table())
    (folder / "site.toml").write_text(
        'name = "st-anna"\n[data]\nformat = "table"\npath = "cases.csv"\n'
        'columns = { case = "case" }\n' + privacy
    )
    lines = ['name = "ages"']
    for name, value in STUDY.items():
        if isinstance(value, dict):
            lines.append(f"[{name}]")
            lines += [f"{k} = {_toml(v)}" for k, v in value.items()]
    (folder / "study.toml").write_text("\n".join(lines) + "\n")
    return folder / "site.toml", folder / "study.toml"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


BUDGET = (
    "[privacy]\nepsilon = 2.0\ndelta = 1e-3\ndeclared_patients = 25\n"
    "[privacy.budget]\nepsilon = 2.5\ndelta = 1e-3\n"
)


def test_the_budget_command_says_what_is_spent_and_what_a_study_would_cost(
    tmp_path, capsys
) -> None:
    site, study = write_site(tmp_path / "h", BUDGET)
    assert main(["budget", str(site), "--study", str(study), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["spent"], said["left"], said["studies"]) == (0.0, 2.5, [])
    assert 1.95 <= said["proposed"]["after"] <= 2.0
    assert said["proposed"]["fits"]

    agreed = study_of()
    cohort = check_with_cohort(load_site(site), agreed).cohort
    patients = [c.patient for c in cohort.cases if c.split == "train"]
    ledger = Ledger(tmp_path / "h" / "privacy-ledger")
    charge = budget.charge_for(agreed, "main", "training", 1, (3.0, 0.5, 6), "patient")
    ledger.settle(ledger.reserve(charge, patients))
    ledger.reserve(charge, patients)

    assert main(["budget", str(site), "--study", str(study), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)
    (row,) = said["studies"]
    assert row["spent"] == row["reserved"] == accounting.epsilon([(3.0, 0.5, 6)], 1e-3)
    assert said["spent"] == accounting.epsilon([(3.0, 0.5, 12)], 1e-3) < 2 * row["spent"]
    assert said["head"] == asdict(ledger.head())
    assert not said["proposed"]["fits"]
    assert 0 <= said["proposed"]["rounds_that_fit"] < 3
    assert 0 < said["proposed"]["epsilon_that_fits"] < 2.0

    assert main(["budget", str(site), "--study", str(study)]) == 4
    text = capsys.readouterr().out
    for words in (
        "a patient has lost at most epsilon",
        "spent",
        "reserved",
        "It does not fit",
        "or",
    ):
        assert words in text
    assert not any(f"p{i}" in text.split() for i in range(20))


def test_the_budget_command_without_a_limit_says_so(tmp_path, capsys) -> None:
    site, _ = write_site(tmp_path / "h", "")
    assert main(["budget", str(site)]) == 0
    assert "no limit for everything" in capsys.readouterr().out
    assert not (tmp_path / "h" / "privacy-ledger").exists()


def test_a_delta_that_may_give_a_patient_away_is_a_fault_of_the_file(tmp_path, capsys) -> None:
    wrong = BUDGET.replace("declared_patients = 25", "declared_patients = 2500")
    site, _ = write_site(tmp_path / "h", wrong)
    assert main(["budget", str(site)]) == 2
    assert "below 1 / declared_patients" in capsys.readouterr().err


def test_the_arrays_of_an_answer_are_what_the_strategy_needs(make_site) -> None:
    site = make_site()
    delta = answer(site, asked(site)).delta
    assert all(np.isfinite(a).all() for a in delta.values())
    assert set(delta) == set(asked(site).weights)


def test_the_same_question_gets_the_same_answer_and_is_paid_once(
    make_site: Callable[..., Hospital], tmp_path: Path
) -> None:
    """A coordinator that died before it kept the answers asks again, in another attempt."""
    site = make_site()
    first = answer(site, asked(site, model="1" * 64))
    paid = list(Ledger(tmp_path / "st-anna" / "ledger").entries())
    again = answer(site, asked(site, model="1" * 64, attempt=1))
    assert digest(again.delta) == digest(first.delta)
    assert list(Ledger(tmp_path / "st-anna" / "ledger").entries()) == paid
    # About another model, it is another question: trained, noised and paid anew.
    other = answer(site, asked(site, model="2" * 64, attempt=1))
    assert digest(other.delta) != digest(first.delta)
    assert len(list(Ledger(tmp_path / "st-anna" / "ledger").entries())) > len(paid)


# --- a bound that follows a quantile --------------------------------------------------------------


def test_the_bound_goes_on_from_round_to_round_and_a_repeated_round_from_the_one_before(
    make_site: Callable[..., Hospital],
) -> None:
    # So large an epsilon that the count of ten patients is not lost in noise.
    more = {"epsilon": 200.0, "clip": 50.0, "clip_quantile": 0.5, "sample_rate": 1.0}
    privacy = {**STUDY["privacy"], **more}
    loose = replace(DECLARED, epsilon=200.0)
    site = make_site(study=study_of(privacy=privacy), privacy=loose, simulated=True)
    kept = [answer(site, asked(site, round_=number)) for number in (1, 2)]
    bounds = [float(home.bound(site.state).as_of(n)["clip"]) for n in (1, 2)]
    assert 50.0 > bounds[0] > bounds[1]
    # The coordinator died and asks for round 2 again: from the bound after round 1, with new noise.
    again = answer(site, asked(site, round_=2, attempt=1))
    assert float(home.bound(site.state).as_of(1)["clip"]) == bounds[0]
    assert float(home.bound(site.state).as_of(2)["clip"]) < bounds[0]
    assert digest(again.delta) != digest(kept[1].delta)


def test_a_moving_bound_is_charged_like_one_that_stays(make_site: Callable[..., Hospital]) -> None:
    charges = []
    for name, quantile in (("north", None), ("south", 0.5)):
        privacy = {**STUDY["privacy"], "clip_quantile": quantile}
        study = study_of(privacy={k: v for k, v in privacy.items() if v is not None})
        site = make_site(name, study=study)
        answer(site, asked(site))
        (line,) = (e.charge for e in site.ledger.entries() if e.charge.purpose == "training")
        charges.append((line.noise_multiplier, line.sample_rate, line.steps))
    assert charges[0] == charges[1]


def test_a_hospital_without_a_quantile_keeps_no_bound(make_site: Callable[..., Hospital]) -> None:
    site = make_site()
    answer(site, asked(site))
    assert home.bound(site.state).as_of(1) == {}


def test_priced_metrics_are_there_whether_few_patients_are_or_none(make_site) -> None:
    # 3 patients a part are below the 5 of policy.smallest_count, 8 are not, and the last site has
    # no test patient at all: what is there, and under which names, is the same.
    assert Policy().smallest_count == 5
    study, told = study_of(privacy=PRICED), []
    nobody = table(20).replace(",test\n", ",train\n")
    for name, text in (("a", table(12)), ("b", table(32)), ("c", nobody)):
        site = make_site(name, study=study, text=text)
        reply = answer(site, asked(site, "finish", 3, parts=("validation", "test")))
        told.append({part: sorted(found) for part, found in reply.metrics.items()})
        assert all(m["accuracy"] is None or 0 <= m["accuracy"] <= 1 for m in reply.metrics.values())
    assert told[0] == told[1] == told[2]
    assert set(told[0]) == {"validation", "test"}
    assert "accuracy" in told[0]["test"]
