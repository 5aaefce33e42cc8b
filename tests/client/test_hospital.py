"""What a hospital answers, what it refuses, and what never leaves it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from medfl.client import budget, home
from medfl.client.data.cases import Case, Cohort, Quarantined
from medfl.client.flower import client_app
from medfl.client.hospital import Hospital, answer, proximal
from medfl.common.errors import (
    BudgetSpent,
    CaseError,
    DataError,
    FederationError,
    PolicyRefused,
    StorageError,
)
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import Envelope, Instruction, Reply, pack, unpack_reply
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights
from medfl.common.site import Policy, SitePrivacy
from medfl.common.statistics import Shared, statistics_to_plain
from medfl.common.study import Study

MakeStudy = Callable[..., Study]
MakeHospital = Callable[..., Hospital]
W, B = "1.weight", "1.bias"
START = {W: np.zeros((1, 1), dtype=np.float32), B: np.zeros(1, dtype=np.float32)}
PRIVATE: dict[str, Any] = {
    "record": {"features": [{"name": "x", "range": [-2, 2]}], "scale": "range"},
    "federation": {"rounds": 3},
    "privacy": {"epsilon": 2.0, "delta": 1e-3, "sample_rate": 0.5},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def asked(study: Study, kind: Any = "round", **more: Any) -> Instruction:
    shared = statistics_to_plain(Shared(private=study.privacy is not None))
    base = Instruction(
        kind=kind, study_digest=study.digest, run="main", round=1, shared=shared, weights=START
    )
    return replace(base, **more)


def bce_gradient(w: float, b: float, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Any:
    error = 1 / (1 + np.exp(-(w * x + b))) - y
    return np.array([np.mean(error * x), np.mean(error)])


# --- answers -----------------------------------------------------------------------------------


def test_prepare_sends_sums_and_counts(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(record={"scale": "federated"})
    here = risk_hospital(study, tmp_path, [1, -2, 5], [0, 1, 1], ["train", "train", "test"])
    reply = answer(here, asked(study, "prepare", round=0))
    assert (reply.n_cases, reply.counts) == (2, {"train": 2, "validation": 0, "test": 1})
    assert reply.statistics["features"] == {"x": {"n": 2.0, "total": -1.0, "squares": 5.0}}
    assert reply.cohort == "cohort of a"


def test_one_round_is_gradient_descent_by_hand(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(training={"local_steps": 3})
    reply = answer(risk_hospital(study, tmp_path), asked(study))
    x, y, p = np.array([-1.0, 1, 2]), np.array([0, 1, 1]), np.zeros(2)
    for _ in range(3):
        p = p - 0.5 * bce_gradient(p[0], p[1], x, y)
    assert reply.delta[W][0, 0] == pytest.approx(p[0], rel=1e-5)
    assert reply.delta[B][0] == pytest.approx(p[1], rel=1e-5)
    assert (reply.steps, reply.n_cases, reply.round) == (3, 3, 1)
    assert reply.epsilon is None


def test_the_received_model_is_judged_before_it_is_trained(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(evaluation={"metrics": ["brier"]})
    parts = ["train", "train", "validation"]
    here = risk_hospital(study, tmp_path, [-1, 1, 2], [0, 1, 1], parts)
    reply = answer(here, asked(study, parts=("validation",)))
    # At zero weights every probability is 1/2, and (1/2)^2 the error.
    assert reply.metrics == {"validation": {"brier": 0.25}}


def test_metrics_leave_with_as_few_decimals_as_the_policy_says(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(evaluation={"metrics": ["brier"]})
    weights = {W: np.ones((1, 1), dtype=np.float32), B: np.zeros(1, dtype=np.float32)}
    here = risk_hospital(
        study, tmp_path, [1, 2], [0, 1], ["train", "test"], policy=Policy(round_metrics_to=1)
    )
    reply = answer(here, asked(study, "finish", parts=("test",), weights=weights))
    # (1 - sigmoid(2))^2 = 0.0142...
    assert reply.metrics == {"test": {"brier": 0.0}}


def test_scores_of_single_cases_stay_in_the_folder(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    from medfl.common.metrics.scores import load

    study = risk_study()
    here = risk_hospital(study, tmp_path, [-1, 1, 2], [0, 1, 1], ["train", "test", "test"])
    reply = answer(here, asked(study, "finish", parts=("validation", "test")))
    assert load(tmp_path / "a" / "scores.npz").keys == ("a1", "a2")
    assert set(reply.metrics["validation"].values()) == {None}
    assert "a1" not in pack(reply).about


def test_numbers_of_a_few_cases_do_not_leave_a_real_hospital(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study()
    parts = ["train"] * 5 + ["validation"] * 4 + ["test"] * 6
    xs, ys = [float(i) for i in range(15)], [i % 2 for i in range(15)]
    here = risk_hospital(study, tmp_path, xs, ys, parts, simulated=False)
    reply = answer(here, asked(study, "finish", parts=("validation", "test")))
    assert reply.counts == {"train": 5, "test": 6}
    assert reply.metrics["validation"] == {}
    assert reply.metrics["test"]
    few = risk_hospital(study, tmp_path, xs[:4], ys[:4], simulated=False, name="b")
    with pytest.raises(PolicyRefused, match=r"4 training patients, and .* no fewer than 5"):
        answer(few, asked(study))


def test_what_was_left_out_is_told_by_reason_only(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study()
    here = risk_hospital(study, tmp_path)
    bad = (Quarantined("Jane Doe", "duplicate", "Jane's file"), Quarantined("b", "duplicate"))
    here.__dict__["cohort"] = replace(here.cohort, quarantined=bad)
    for kind in ("prepare", "finish"):
        reply = answer(here, asked(study, kind, round=0))
        assert reply.left_out == {"duplicate": 2}
        assert "Jane" not in pack(reply).about


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prepare", "round", "finish"])
def test_another_study_is_refused_whatever_is_asked(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path, kind: str
) -> None:
    study = risk_study()
    with pytest.raises(PolicyRefused, match="another study"):
        answer(risk_hospital(study, tmp_path), replace(asked(study, kind), study_digest="0" * 64))


@pytest.mark.parametrize("kind", ["prepare", "round", "finish"])
def test_a_task_outside_the_policy_is_refused(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path, kind: str
) -> None:
    study = risk_study()
    here = risk_hospital(study, tmp_path, policy=Policy(tasks=("segmentation",)))
    with pytest.raises(PolicyRefused, match=r"policy\.tasks"):
        answer(here, asked(study, kind))


@pytest.mark.parametrize("kind", ["prepare", "round", "finish"])
def test_too_few_cases_are_refused_even_if_nobody_asked_to_prepare(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path, kind: str
) -> None:
    study = risk_study()
    here = risk_hospital(study, tmp_path, policy=Policy(min_cases=4))
    with pytest.raises(PolicyRefused, match="3 training cases"):
        answer(here, asked(study, kind))
    enough = risk_hospital(study, tmp_path, policy=Policy(min_cases=3))
    assert answer(enough, asked(study, kind)).refusal == ""


def test_weights_of_another_model_are_refused(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study()
    with pytest.raises(FederationError, match="do not fit"):
        answer(risk_hospital(study, tmp_path), asked(study, weights={W: START[W]}))


# --- FedProx -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "w0"), [(3.0, 1.0), (-2.0, 1.0), (0.5, -4.0), (1.0, 1.0)])
def test_the_proximal_gradient_is_mu_times_the_way_gone(w: float, w0: float) -> None:
    own = torch.tensor([w, 2 * w], requires_grad=True)
    penalty = proximal(0.3)({"w": own}, {"w": torch.tensor([w0, w0])})
    assert float(penalty.detach()) == pytest.approx(0.15 * ((w - w0) ** 2 + (2 * w - w0) ** 2))
    penalty.backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    assert own.grad.tolist() == pytest.approx([0.3 * (w - w0), 0.3 * (2 * w - w0)])


def test_fedprox_pulls_from_the_second_step_on(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    deltas = {}
    for steps in (1, 2):
        for name in ("fedavg", "fedprox"):
            federation: dict[str, Any] = {"strategy": name}
            if name == "fedprox":
                federation["options"] = {"mu": 0.8}
            study = risk_study(training={"local_steps": steps}, federation=federation)
            # Two weights that move to opposite sides. One name, hence one order of the cases: sums
            # of another order have another last bit.
            folder = tmp_path / f"{name}{steps}"
            here = risk_hospital(study, folder, [3, 2, -1], [1, 0, 0], name="h")
            d = answer(here, asked(study)).delta
            deltas[name, steps] = np.array([d[W][0, 0], d[B][0]], dtype=np.float64)
    assert np.array_equal(deltas["fedprox", 1], deltas["fedavg", 1])
    assert deltas["fedavg", 1][0] > 0 > deltas["fedavg", 1][1]
    # The second step differs by -eta mu (w1 - w0), with eta 0.5 and mu 0.8.
    expected = deltas["fedavg", 2] - 0.5 * 0.8 * deltas["fedavg", 1]
    assert deltas["fedprox", 2] == pytest.approx(expected, rel=1e-5)


# --- what stays at home ------------------------------------------------------------------------


def images(study: Study, folder: Path, name: str, shift: float) -> Hospital:
    rng = np.random.default_rng(len(name))
    inputs = (rng.normal(size=(6, 1, 8, 8)) + shift).astype(np.float32)
    cases = tuple(Case(f"{i}", f"{i}", "train" if i < 4 else "validation") for i in range(6))
    cohort = Cohort(cases, inputs, np.array([0, 1, 0, 1, 0, 1]), digest=name)
    return Hospital(name, study, lambda: cohort, folder / name, simulated=True)


@pytest.fixture
def bn_study(risk_study: MakeStudy) -> Study:
    from medfl.common.study import ImageInput, Model

    base = risk_study(training={"learning_rate": 0.1}, federation={"strategy": "fedbn"})
    return replace(
        base,
        task=replace(base.task, kind="classification"),
        record=None,
        image=ImageInput(dimensions=2, size=[8, 8]),
        model=Model(name="cnn", options={"channels": [4], "dense": 0, "norm": "batch"}),
    )


def test_normalisation_layers_never_leave(bn_study: Study, tmp_path: Path) -> None:
    weights = get_weights(build_model(bn_study, Shared(), seed=1))
    norm = {n for n in weights if n.startswith("1.")}
    assert {"1.weight", "1.running_mean", "1.num_batches_tracked"} <= norm
    kept = {}
    for name, shift in (("near", 0.0), ("far", 5.0)):
        reply = answer(images(bn_study, tmp_path, name, shift), asked(bn_study, weights=weights))
        assert set(reply.delta) == set(weights) - norm
        kept[name] = home.layers(tmp_path / name / "state").as_of(1)
        assert set(kept[name]) == norm
    assert not np.allclose(kept["near"]["1.running_mean"], kept["far"]["1.running_mean"])


def test_a_sites_own_layers_are_used_again(bn_study: Study, tmp_path: Path) -> None:
    weights = get_weights(build_model(bn_study, Shared(), seed=1))
    here = images(bn_study, tmp_path, "near", 3.0)
    first = answer(here, asked(bn_study, weights=weights))
    own = home.layers(here.state).as_of(1)
    # As if the coordinator took this site's delta as it is.
    moved = {n: a + first.delta[n] if n in first.delta else a for n, a in weights.items()}
    second = answer(here, asked(bn_study, weights=moved, round=2, parts=("validation",)))
    with_own = {**moved, **own}
    alone = replace(bn_study, federation=replace(bn_study.federation, strategy="fedavg"))
    there = images(alone, tmp_path / "alone", "near", 3.0)
    expected = answer(there, asked(alone, weights=with_own, round=2, parts=("validation",)))
    assert second.metrics == expected.metrics
    assert all(np.array_equal(second.delta[n], expected.delta[n]) for n in second.delta)


def test_layers_of_the_best_round_and_of_the_last_are_kept(tmp_path: Path) -> None:
    def layers(value: float) -> dict[str, Any]:
        return {"1.weight": np.array([value], dtype=np.float32)}

    for round_, best in ((1, 0), (2, 0), (3, 2), (4, 2), (7, 2)):
        home.layers(tmp_path).save(round_, layers(round_), best)
    assert sorted(p.name[5:10] for p in tmp_path.glob("*")) == ["00002", "00004", "00007"]
    assert home.layers(tmp_path).as_of(2)["1.weight"] == 2
    # Not drawn in rounds 5 and 6: its layers are still those of round 4.
    assert home.layers(tmp_path).as_of(6)["1.weight"] == 4
    assert home.layers(tmp_path).as_of(9)["1.weight"] == 7
    assert home.layers(tmp_path).as_of(0) == {}


def test_local_sends_nothing_and_equals_training_alone(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    together = risk_study(federation={"strategy": "local", "rounds": 2})
    here = risk_hospital(together, tmp_path)
    for round_ in (1, 2):
        assert answer(here, asked(together, round=round_)).delta == {}
    alone = risk_study(training={"local_steps": 4}, federation={"rounds": 1})
    delta = answer(risk_hospital(alone, tmp_path / "alone"), asked(alone)).delta
    own = home.layers(here.state).as_of(2)
    assert own[W] == pytest.approx(delta[W], rel=1e-5)
    assert own[B] == pytest.approx(delta[B], rel=1e-5)


def test_fedbn_without_normalisation_layers_is_refused(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    from medfl.common.errors import ConfigError

    study = risk_study(federation={"strategy": "fedbn"})
    with pytest.raises(ConfigError, match="normalisation"):
        answer(risk_hospital(study, tmp_path), asked(study))


# --- SCAFFOLD ----------------------------------------------------------------------------------


def test_the_control_variate_changes_as_option_two_says() -> None:
    # x - y = -delta; K eta = 4 * 0.5: c_i+ - c_i = -c - delta / 2
    one = {"w": np.array([1.0, -1.0], dtype=np.float32)}
    own = {"w": np.array([9.0, 9.0], dtype=np.float32)}
    delta = {"w": np.array([-6.0, 2.0], dtype=np.float32)}
    assert home.control_change(own, one, delta, 2.0)["w"].tolist() == [2.0, 0.0]


def test_scaffold_without_the_coordinators_control_is_refused(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(federation={"strategy": "scaffold"})
    with pytest.raises(FederationError, match="control variate"):
        answer(risk_hospital(study, tmp_path), asked(study))


# --- privacy -----------------------------------------------------------------------------------


def test_epsilon_grows_to_the_target_and_not_beyond(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(**PRIVATE)
    here = risk_hospital(study, tmp_path)
    spent = [answer(here, asked(study, round=r)).epsilon for r in (1, 2, 3)]
    assert spent == sorted(spent)  # type: ignore[type-var]
    assert 1.98 <= spent[2] <= 2.0  # type: ignore[operator]
    finished = answer(here, asked(study, "finish", round=3))
    assert (finished.epsilon, finished.target_delta) == (spent[2], 1e-3)
    with pytest.raises(BudgetSpent, match="End the study"):
        answer(here, asked(study, round=4))
    with pytest.raises(BudgetSpent):
        answer(here, asked(study, round=1))


def test_a_round_asked_twice_has_other_noise(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    """With equal noise, the difference of two answers would show the gradients without noise."""
    study = risk_study(**PRIVATE)
    here = risk_hospital(study, tmp_path)
    first, again = (answer(here, asked(study, seed=1)).delta for _ in range(2))
    assert not np.array_equal(first[W], again[W])


def test_a_damaged_ledger_is_not_an_empty_one(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(**PRIVATE)
    here = risk_hospital(study, tmp_path)
    answer(here, asked(study))
    (here.state / "ledger" / "ledger.jsonl").write_text("[[1.0, 0.5")
    with pytest.raises(StorageError, match="ledger"):
        answer(here, asked(study))


@pytest.mark.parametrize(
    ("study", "site", "expected"),
    [
        (None, None, None),
        (8.0, None, 8.0),
        (None, 3.0, 3.0),
        (8.0, 3.0, 3.0),
        (1.0, 3.0, 1.0),
    ],
)
def test_the_stricter_epsilon_wins(
    risk_study: MakeStudy, study: float | None, site: float | None, expected: float | None
) -> None:
    tables = {} if study is None else {"privacy": {"epsilon": study, "delta": 1e-3}}
    made = risk_study(**tables)
    privacy = budget.terms_of(made, None if site is None else SitePrivacy(epsilon=site))
    assert (None if privacy is None else privacy.epsilon) == expected
    if study and site:
        assert privacy is not None
        assert privacy.delta == 1e-5


def test_a_site_may_be_private_in_a_study_that_is_not(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(record=PRIVATE["record"])
    here = risk_hospital(study, tmp_path, privacy=SitePrivacy(epsilon=1.0, delta=1e-3))
    assert answer(here, asked(study, "prepare")).statistics["private"] is True
    reply = answer(here, asked(study))
    assert reply.loss is None
    assert 0 < reply.epsilon <= 1.0  # type: ignore[operator]


@pytest.mark.parametrize("scale", ["federated", "site"])
def test_a_private_site_sends_no_sums_without_noise(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path, scale: str
) -> None:
    study = risk_study(record={"scale": scale})
    here = risk_hospital(study, tmp_path, privacy=SitePrivacy(epsilon=1.0))
    with pytest.raises(PolicyRefused, match=r"record\.scale"):
        answer(here, asked(study, "prepare"))


def test_a_private_site_tells_nothing_but_the_number_of_cases(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(**PRIVATE)
    plain = answer(risk_hospital(study, tmp_path), asked(study, "prepare")).statistics
    told = {name for name, value in plain.items() if value}
    assert told == {"n_cases", "private"}


def test_a_private_site_gives_no_metrics_of_its_training_cases(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study(**PRIVATE)
    with pytest.raises(PolicyRefused, match="training cases"):
        answer(risk_hospital(study, tmp_path), asked(study, parts=("train",)))


# --- over Flower -------------------------------------------------------------------------------


def over_flower(hospital: Hospital, content: RecordDict) -> tuple[Reply, bytes]:
    """One question through the real ClientApp; the reply, and all bytes that would travel."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    app = client_app(lambda context: hospital)
    context = Context(1, 1, {}, RecordDict(), {})
    message = Message(content, 1, "train.round")
    out = app(message, context)
    return unpack_reply(from_record(out.content)), message_to_proto(out).SerializeToString()


def test_an_answer_travels_through_the_client_app(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    study = risk_study()
    reply, _ = over_flower(risk_hospital(study, tmp_path), to_record(pack(asked(study))))
    assert (reply.site, reply.refusal, reply.n_cases) == ("a", "", 3)


def test_what_a_record_says_is_kept_no_longer_than_the_record(
    risk_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medfl.client import flower as module

    reads = 0
    real = module.unpack_instruction

    def counted(envelope: Envelope) -> Instruction:
        nonlocal reads
        reads += 1
        return real(envelope)

    monkeypatch.setattr(module, "unpack_instruction", counted)
    read, study = module._Reader(), risk_study()
    first, second = to_record(pack(asked(study))), to_record(pack(asked(study, round=2)))
    assert [read(r)[1].round for r in (first, first, second, second, first)] == [1, 1, 2, 2, 1]
    assert reads == 3
    of_first = weakref.ref(next(iter(read(first)[0].arrays["weights"].values())))
    assert of_first() is not None
    del first
    gc.collect()
    assert of_first() is None


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (DataError("Jane Doe is in twice"), "data cannot serve the study"),
        (CaseError("unreadable", "Jane Doe.dcm"), "data cannot serve the study"),
        (ValueError("Jane Doe"), "unexpected error"),
        (OSError(28, "No space left", "/data/Jane Doe"), "unexpected error"),
        (MemoryError("Jane Doe"), "out of memory"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_no_text_of_an_error_leaves_the_hospital(
    risk_study: MakeStudy, tmp_path: Path, error: Exception, phrase: str
) -> None:
    def fail() -> Cohort:
        raise error

    study = risk_study()
    here = Hospital("a", study, fail, tmp_path)
    reply, sent = over_flower(here, to_record(pack(asked(study))))
    assert (reply.refusal, reply.round) == (phrase, 1)
    assert b"Jane" not in sent
    assert b"Doe" not in sent


def test_a_foreign_error_is_not_told_to_the_log_either(
    risk_study: MakeStudy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Cohort:
        raise ValueError("Jane Doe")

    study = risk_study()
    over_flower(Hospital("a", study, fail, tmp_path), to_record(pack(asked(study))))
    assert "ValueError in test_hospital.py" in caplog.text
    assert "Jane" not in caplog.text


def test_a_message_that_is_none_is_answered_with_a_refusal(
    risk_study: MakeStudy, risk_hospital: MakeHospital, tmp_path: Path
) -> None:
    reply, _ = over_flower(risk_hospital(risk_study(), tmp_path), RecordDict())
    assert reply.refusal == "message could not be used"


def test_a_node_without_hospital_is_answered_with_a_refusal(tmp_path: Path) -> None:
    def nobody(context: Context) -> Hospital:
        raise KeyError("Jane Doe")

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    out = client_app(nobody)(
        Message(to_record(pack(Instruction("prepare", "", "main"))), 1, "query.prepare"),
        Context(1, 1, {}, RecordDict(), {}),
    )
    assert unpack_reply(from_record(out.content)).refusal == "unexpected error"
