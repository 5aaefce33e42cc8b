"""Rounds whose updates are summed under masks: results, dropouts, refusals, what is seen."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from medfl.client import hospital as module
from medfl.client.hospital import answer
from medfl.client.secure_site import simulated_identity
from medfl.common import tensors
from medfl.common.backup import below
from medfl.common.errors import FederationError, PolicyRefused
from medfl.common.messages import pack
from medfl.common.secure.updates import cap_of, scale_of
from medfl.common.tensors import floats, l2_norm
from medfl.server.rounds import run_study

NAMES = tuple(f"h{i}" for i in range(5))
SECURE = {"threshold": 0.5, "range": 2.0}
# Training cases: two thirds of 60, 70, ... 100.
CASES = {"h0": 40, "h1": 46, "h2": 53, "h3": 60, "h4": 66}


def largest_difference(one, other) -> float:
    return max(float(np.abs(a - other[n]).max()) for n, a in floats(one).items())


SUMS = [
    ("fedavg", {}),
    ("fedprox", {"mu": 0.1}),
    ("fedavgm", {}),
    ("fedadam", {"tau": 0.1}),
    ("fedyogi", {"tau": 0.1}),
    ("fedadagrad", {"tau": 0.1}),
]


@pytest.mark.parametrize(("strategy", "options"), SUMS, ids=[s for s, _ in SUMS])
def test_one_round_is_the_plain_round_to_the_quantisation_step(
    table_study, wire, train, strategy, options
) -> None:
    about = {"strategy": strategy, "options": options, "rounds": 1}
    plain = train(wire(table_study(None, **about)))
    secure = train(wire(table_study(SECURE, **about)))
    assert secure.records[0].left_out == {}
    step = scale_of(table_study(SECURE, **about), 5, cap_of(66)).step(sum(CASES.values()))
    # Each of five sites is off by half a step at most; the adaptive steps divide by tau or more.
    slack = 10 if "tau" in options else 1
    assert largest_difference(plain.weights, secure.weights) <= slack * (5 / 2 * step + 6e-8)
    assert largest_difference(plain.weights, secure.weights) < 1e-5


def test_several_rounds_stay_with_the_plain_ones(table_study, wire, train) -> None:
    plain = train(wire(table_study(None)))
    secure = train(wire(table_study(SECURE)))
    assert largest_difference(plain.weights, secure.weights) < 1e-5
    assert [r.void for r in secure.records] == [False] * len(plain.records)


def test_scaffold_sums_its_control_variates_too(table_study, wire, train) -> None:
    plain = train(wire(table_study(None, strategy="scaffold")))
    secure = train(wire(table_study(SECURE | {"control_range": 8.0}, strategy="scaffold")))
    assert largest_difference(plain.weights, secure.weights) < 1e-4


@pytest.mark.parametrize("weighting", ["cases", "sqrt_cases", "equal"])
def test_hospitals_count_by_the_studys_weighting(table_study, wire, train, weighting) -> None:
    plain = train(wire(table_study(None, rounds=1, weighting=weighting)))
    secure = train(wire(table_study(SECURE, rounds=1, weighting=weighting)))
    assert largest_difference(plain.weights, secure.weights) < 1e-6


@pytest.mark.parametrize(
    ("updates", "bytes_a_number"), [("float32", 4), ("float16", 3), ("int8", 2), ("int4", 2)]
)
def test_updates_travel_in_the_bytes_that_the_study_says(
    table_study, wire, train, updates, bytes_a_number
) -> None:
    plain = train(wire(table_study(None)))
    said = wire(table_study(SECURE, updates=updates))
    secure = train(said)
    n = sum(a.size for a in plain.weights.values())
    assert secure.records[0].bytes_up == 5 * n * bytes_a_number
    # Steps of 2 * 2 * 5 / 256^bytes; int8's rounding comes back in the next round.
    assert largest_difference(plain.weights, secure.weights) < 3 * 20 / 256**bytes_a_number + 1e-6


def test_the_same_seed_gives_the_same_bits_under_other_masks(table_study, wire, train) -> None:
    study = table_study(SECURE)
    one, other = wire(study), wire(study)
    weights = [tensors.digest(train(w).weights) for w in (one, other)]
    assert weights[0] == weights[1]
    masked = [next(e for kind, e in w.heard if kind == "round") for w in (one, other)]
    assert tensors.digest(masked[0].arrays["delta"]) != tensors.digest(masked[1].arrays["delta"])


def test_differential_privacy_and_masks_go_together(table_study, wire, train) -> None:
    privacy = {"epsilon": 5.0, "delta": 1e-3, "sample_rate": 0.3}
    plain = train(wire(table_study(None, privacy=privacy)))
    secure = train(wire(table_study(SECURE, privacy=privacy)))
    # The simulation's noise comes from its seed: the two differ by rounding alone.
    assert largest_difference(plain.weights, secure.weights) < 1e-5
    assert [s["epsilon"] for s in secure.records[2].sites] == [
        s["epsilon"] for s in plain.records[2].sites
    ]


@pytest.mark.parametrize("kind", ["keys", "shares", "round"])
def test_sites_that_fall_silent_are_left_out_and_the_others_summed(
    table_study, wire, train, kind
) -> None:
    plain, secure = wire(table_study(None, rounds=1)), wire(table_study(SECURE, rounds=1))
    plain.silent, secure.silent = {"round": ("h1", "h3")}, {kind: ("h1", "h3")}
    expected, found = train(plain), train(secure)
    assert found.records[0].left_out == {"h1": "late", "h3": "late"}
    assert not found.records[0].void
    assert largest_difference(expected.weights, found.weights) < 1e-6


def test_sites_that_fall_silent_before_unmasking_still_count(table_study, wire, train) -> None:
    everybody, secure = wire(table_study(None, rounds=1)), wire(table_study(SECURE, rounds=1))
    secure.silent = {"unmask": ("h1", "h3")}
    expected, found = train(everybody), train(secure)
    assert found.records[0].left_out == {}
    assert largest_difference(expected.weights, found.weights) < 1e-6


@pytest.mark.parametrize("kind", ["shares", "round", "unmask"])
def test_a_round_below_the_threshold_is_void_and_the_next_one_is_not(
    table_study, wire, train, kind
) -> None:
    said = wire(table_study(SECURE, rounds=2))

    def silent_once(asked, reply):
        if asked.round == 1 and asked.kind == kind and reply.site in NAMES[:3]:
            return replace(reply, refusal="late", secure={}, delta={})
        return reply

    said.spoil = silent_once
    outcome = train(said)
    assert [r.void for r in outcome.records[:2]] == [True, False]


def test_a_drawn_subset_is_a_secure_sum_of_its_own(table_study, wire, train) -> None:
    about = {"sites_per_round": 3, "rounds": 2}
    plain, said = train(wire(table_study(None, **about))), wire(table_study(SECURE, **about))
    secure = train(said)
    assert largest_difference(plain.weights, secure.weights) < 1e-5
    assert len({name for name, asked in said.asked if asked.kind == "keys"}) >= 3
    assert len([1 for _, asked in said.asked if asked.kind == "keys"]) == 6


def kinds(said, name="h0") -> list[str]:
    return [asked.kind for site, asked in said.asked if site == name]


def test_later_rounds_take_two_exchanges_and_four_after_a_site_fell_silent(
    table_study, wire, train
) -> None:
    said = wire(table_study(SECURE, rounds=4))

    def silent_once(asked, reply):
        if (asked.round, asked.kind, reply.site) == (2, "round", "h3"):
            return replace(reply, refusal="late", secure={}, delta={})
        return reply

    said.spoil = silent_once
    outcome = train(said)
    four, two = ["keys", "shares", "round", "unmask"], ["round", "unmask"]
    assert kinds(said) == ["prepare", *four, *two, *four, *two, "finish"]
    assert [r.left_out for r in outcome.records[:4]] == [{}, {"h3": "late"}, {}, {}]
    plain = wire(table_study(None, rounds=4))
    plain.spoil = silent_once
    assert largest_difference(train(plain).weights, outcome.weights) < 1e-5
    folder = said.hospitals[0].state / "secure"
    assert sorted(f.name for f in folder.glob("member*")) == [
        f"member-0000{r}.once" for r in (3, 4)
    ]


def test_keys_are_new_in_each_round_also_where_they_come_ahead(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=3))
    train(said)
    about = [json.loads(e.about)["secure"] for _, e in said.heard]
    adverts = [a for a in about if "masking" in a and "site" in a]
    assert len(adverts) == 15
    for key in ("sharing", "masking", "own"):
        assert len({a[key] for a in adverts}) == 15


def test_false_keys_that_come_ahead_cost_no_round(table_study, wire, train) -> None:
    """The other sites give this round's shares all the same, and the next one begins with keys."""
    said = wire(table_study(SECURE, rounds=2))

    def forged(asked, reply):
        if asked.kind == "round" and reply.site == "h3" and reply.secure:
            return replace(reply, secure={**reply.secure, "masking": "11" * 32})
        return reply

    said.spoil = forged
    outcome = train(said)
    assert [r.void for r in outcome.records[:2]] == [False, False]
    assert kinds(said).count("keys") == 2


# What the coordinator sees.


def test_nothing_that_the_coordinator_received_tells_of_one_update(
    table_study, wire, train
) -> None:
    """Read all that it ever got; the plain update's bytes and numbers are nowhere in it."""
    plain, secure = wire(table_study(None, rounds=4)), wire(table_study(SECURE, rounds=4))
    train(plain)
    train(secure)
    found = [e for kind, e in secure.heard if kind == "round"]
    heard = b"".join(
        envelope.about.encode()
        + b"".join(a.tobytes() for g in envelope.arrays.values() for a in g.values())
        for _, envelope in secure.heard
    )
    sent = [e.arrays["delta"] for kind, e in plain.heard if kind == "round"][:5]
    for update in sent:
        for array in update.values():
            numbers = np.ravel(array)
            assert not any(numbers[i : i + 2].tobytes() in heard for i in range(len(numbers) - 1))
    # All arrays of all answers: one masked array an update, and each number of it uniform.
    assert all(set(e.arrays["delta"]) == {"masked"} and not e.arrays["control"] for e in found)
    others = [e for kind, e in secure.heard if kind != "round"]
    assert not any(group for e in others for group in e.arrays.values())
    words = np.concatenate([e.arrays["delta"]["masked"] for e in found])
    assert len(words) == 4 * 5 * sum(a.size for a in sent[0].values())
    assert stats.kstest((words + 0.5) / 2**32, "uniform").pvalue > 1e-7
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-7


def test_no_metric_and_no_loss_of_a_hospital_leaves_it_under_masks(
    table_study, wire, train, tmp_path
) -> None:
    """What it says of chosen weights would tell its labels; it evaluates for itself."""
    said = wire(table_study(SECURE, rounds=2))
    outcome = train(said)
    plain = wire(table_study(None, rounds=2))
    train(plain)
    about = [json.loads(e.about) for kind, e in said.heard if kind in ("round", "finish")]
    assert len(about) == 15
    assert all(a["loss"] is None and not any(a["metrics"].values()) for a in about)
    assert any(any(json.loads(e.about)["metrics"].values()) for _, e in plain.heard)
    assert outcome.records[0].loss is None
    assert (said.hospitals[0].folder / "scores.npz").exists()


def test_priced_metrics_leave_with_noise_under_masks_too(table_study, wire, train) -> None:
    privacy = {"epsilon": 5.0, "delta": 1e-3, "sample_rate": 0.3, "metrics_epsilon": 4.0}
    said = wire(table_study(SECURE, rounds=1, privacy=privacy))
    train(said)
    finished = [
        json.loads(e.about)["metrics"]["test"] for kind, e in said.heard if kind == "finish"
    ]
    assert all(isinstance(m["accuracy"], float) for m in finished)


def test_the_coordinator_holds_no_share_that_it_can_read_before_unmasking(
    table_study, wire, train
) -> None:
    """Sealed shares of a site: as many as sites, all different, and in no answer in the open."""
    said = wire(table_study(SECURE, rounds=1))
    train(said)
    boxes = [json.loads(e.about)["secure"]["shares"] for kind, e in said.heard if kind == "shares"]
    sealed = [text for box in boxes for text in box.values()]
    assert len(set(sealed)) == len(sealed) == 25
    shown = [json.loads(e.about)["secure"] for kind, e in said.heard if kind == "unmask"]
    assert all(set(r["revealed"]["own"]) == set(NAMES) for r in shown)
    assert all(r["revealed"]["masking"] == {} for r in shown)


# What hospitals refuse.


def test_a_site_that_requires_masks_takes_no_part_without_them(table_study, wire, train) -> None:
    said = wire(table_study(None), require_secure_aggregation=True)
    with pytest.raises(FederationError, match="not allowed by the hospital's policy"):
        train(said)
    train(wire(table_study(SECURE, rounds=1), require_secure_aggregation=True))


def test_too_small_a_sum_is_refused_by_the_sites_own_policy(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=1), min_sum_sites=5)
    assert not train(said).records[0].void
    said = wire(table_study(SECURE, rounds=1), min_sum_sites=5)
    said.silent = {"round": ("h2",)}
    with pytest.raises(FederationError, match="None of 1 rounds"):
        train(said)
    # Nobody gave a share: with four alive the sum would be over fewer than five.
    assert not [1 for kind, e in said.heard if kind == "unmask" and json.loads(e.about)["secure"]]


def test_a_site_does_not_train_for_a_round_that_it_will_not_be_summed_in(
    table_study, wire, train
) -> None:
    said = wire(table_study(SECURE, rounds=1), min_sum_sites=5)
    said.silent = {"shares": ("h2",)}
    with pytest.raises(FederationError, match="None of 1 rounds"):
        train(said)
    answers = [json.loads(e.about) for kind, e in said.heard if kind == "round"]
    assert [a["steps"] for a in answers] == [0] * 4


def test_a_round_is_not_summed_a_second_time_over_other_sites(table_study, wire, train) -> None:
    """The difference of the two sums would be the missing site's update."""
    study = table_study(SECURE, rounds=1)
    said = wire(study)
    first = train(said)
    said.silent = {"round": ("h4",)}
    with pytest.raises(FederationError, match="None of 1 rounds"):
        train(said)
    said.silent = {}
    again = train(said)
    assert tensors.digest(again.weights) == tensors.digest(first.weights)


def started_again(said):
    """The same hospitals on the same disks, in new processes."""
    return replace(said, hospitals=[replace(h, said={}, masked={}) for h in said.hospitals])


@pytest.mark.parametrize("between", [(), ("X",)], ids=["A, B", "A, X, B"])
@pytest.mark.parametrize("run", ["A", "B"])
def test_one_models_updates_are_summed_over_one_set_of_sites_in_all_runs(
    table_study, wire, between, run
) -> None:
    """Batches of all cases make an update a function of the model alone: without this, the sum over
    five in run A minus the sum over four in run B is h4's update."""
    study = table_study(SECURE, rounds=1)
    study = replace(study, training=replace(study.training, batch_size=100))
    said = wire(study)
    first = run_study(study, said, seed=1, run="A")
    for name in between:
        run_study(study, said, seed=2, run=name)
    said = started_again(said)
    four = replace(said, hospitals=said.hospitals[:4])
    with pytest.raises(FederationError, match="None of 1 rounds"):
        run_study(study, four, seed=1, run=run, attempt=1)
    # Refused before anybody trained.
    rounds = [json.loads(e.about) for kind, e in four.heard if kind == "round"]
    assert [r["steps"] for r in rounds[-4:]] == [0] * 4
    said.silent = {"round": ("h4",)}
    with pytest.raises(FederationError, match="None of 1 rounds"):
        run_study(study, said, seed=1, run=run, attempt=2)
    said.silent = {}
    again = run_study(study, said, seed=1, run=run, attempt=3)
    assert largest_difference(again.weights, first.weights) < 1e-6
    # Other weights to begin with are another sum, over whom it may be.
    assert not run_study(study, four, seed=3, run="C").records[0].void


def test_a_model_that_stayed_as_it_was_is_summed_over_the_same_sites_in_the_next_round(
    table_study, wire, train
) -> None:
    said = wire(table_study(SECURE, rounds=2))

    def spoil(asked, reply):
        """Round 1 is summed by all and lost: only one site's shares arrive."""
        if (asked.round, asked.kind) == (1, "unmask") and reply.site != "h0":
            return replace(reply, refusal="late", secure={})
        if (asked.round, asked.kind, reply.site) == (2, "round", "h4"):
            return replace(reply, refusal="late", secure={}, delta={})
        return reply

    said.spoil = spoil
    with pytest.raises(FederationError, match="None of 2 rounds"):
        train(said)


def test_the_runs_name_is_in_the_seed_of_training_under_masks_alone(table_study, wire) -> None:
    """Two runs of one seed train on other batches; "main" is what a simulation's run is called."""
    for secure, same in ((SECURE, False), (None, True)):
        study = table_study(secure, rounds=1)
        one, other = (
            run_study(study, wire(study), seed=1, run=run).weights for run in ("main", "trial-2")
        )
        assert (tensors.digest(one) == tensors.digest(other)) is same
    study = table_study(SECURE, rounds=1)
    named = [run_study(study, wire(study), seed=1, run="r1").weights for _ in range(2)]
    assert tensors.digest(named[0]) == tensors.digest(named[1])


def test_a_round_that_is_taken_up_again_masks_the_same_update_anew(
    table_study, wire, train
) -> None:
    """A coordinator that died asks again under a new attempt: new keys, no second training."""
    said = wire(table_study(SECURE, rounds=1))
    said.hospitals = [
        replace(h, simulated=False, identity=simulated_identity(h.name)) for h in said.hospitals
    ]
    study = said.hospitals[0].study
    kept = []

    def died(checkpoint):
        kept.append(checkpoint.model.digest)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, said, seed=1, keep=died)
    again = run_study(study, said, seed=1, attempt=1)
    assert tensors.digest(again.weights) == kept[0]
    rounds = [(json.loads(e.about), e.arrays["delta"]) for kind, e in said.heard if kind == "round"]
    once, twice = rounds[:5], rounds[5:]
    assert [about["seconds"] for about, _ in once] == [about["seconds"] for about, _ in twice]
    digests = {tensors.digest(delta) for _, delta in rounds}
    assert len(digests) == 10


def test_a_question_whose_answer_was_lost_is_answered_in_the_same_bits(
    table_study, wire, train
) -> None:
    """Each step is asked twice, and the second answer counts: nothing is made or masked anew."""
    plain, said = wire(table_study(SECURE, rounds=2)), wire(table_study(SECURE, rounds=2))
    said.hospitals = [
        replace(h, simulated=False, identity=simulated_identity(h.name)) for h in said.hospitals
    ]
    here = {h.name: h for h in said.hospitals}
    twice = []

    def asked_again(asked, reply):
        again = answer(here[reply.site], asked)
        twice.append((asked.kind, pack(again).about == pack(reply).about))
        assert tensors.digest(again.delta) == tensors.digest(reply.delta)
        return again

    said.spoil = asked_again
    outcome = train(said)
    assert [r.left_out for r in outcome.records] == [{}] * len(outcome.records)
    assert {kind for kind, _ in twice} >= {"keys", "shares", "round", "unmask"}
    assert all(same for _, same in twice)
    assert tensors.digest(outcome.weights) == tensors.digest(train(plain).weights)


def test_a_hospital_without_an_identity_takes_no_part(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=1))
    said.hospitals = [replace(h, simulated=False) for h in said.hospitals]
    with pytest.raises(FederationError, match="study cannot be run there"):
        train(said)


def test_what_a_site_keeps_of_an_exchange_is_for_its_own_eyes(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=1))
    train(said)
    folder = said.hospitals[0].state / "secure"
    assert folder.stat().st_mode & 0o077 == 0
    assert {f.name for f in folder.iterdir()} == {"member-00001.once", "sums.jsonl"}
    assert not any(f.stat().st_mode & 0o077 for f in folder.iterdir())
    assert [name for name, _ in below(folder, "state")] == ["state/sums.jsonl"]  # in a backup


def test_a_message_of_a_round_cannot_be_asked_twice(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=1))
    train(said)
    for kind, why in (("round", "masked already"), ("shares", "shared already")):
        asked = next(a for name, a in said.asked if name == "h0" and a.kind == kind)
        with pytest.raises(PolicyRefused, match=why):
            answer(said.hospitals[0], asked)


def test_a_plain_round_is_refused_where_the_study_has_masks(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=1))
    train(said)
    asked = next(a for _, a in said.asked if a.kind == "round")
    with pytest.raises(FederationError, match="fields of Present"):
        answer(said.hospitals[0], replace(asked, secure={}))


def test_an_update_that_is_not_finite_stays_at_the_hospital(
    table_study, wire, train, monkeypatch
) -> None:
    said = wire(table_study(SECURE, rounds=1))
    real = module._leaving

    def broken(hospital, asked, delta, control):
        delta, control = real(hospital, asked, delta, control)
        if hospital.name == "h2":
            delta = {n: np.where(a == a.flat[0], np.nan, a) for n, a in delta.items()}
        return delta, control

    monkeypatch.setattr(module, "_leaving", broken)
    outcome = train(said)
    assert outcome.records[0].left_out == {"h2": "value that is not finite"}
    assert tensors.all_finite(outcome.weights)


# The range, and the length.


def test_a_change_beyond_the_range_is_cut_off(table_study, wire, train, caplog) -> None:
    outcome = train(wire(table_study(SECURE | {"range": 1e-3}, rounds=1)))
    start = train(
        wire(table_study(None, rounds=1, strategy="fedavgm", options={"learning_rate": 1e-9}))
    )
    assert largest_difference(start.weights, outcome.weights) == pytest.approx(1e-3, rel=1e-3)
    assert "were cut off at secure_aggregation.range" in caplog.text


def test_a_hospital_shortens_its_own_update(table_study, wire, train) -> None:
    start = train(
        wire(table_study(None, rounds=1, strategy="fedavgm", options={"learning_rate": 1e-9}))
    )
    outcome = train(wire(table_study(SECURE | {"max_norm": 0.01}, rounds=1)))
    change = {n: a - start.weights[n] for n, a in outcome.weights.items()}
    assert 0.005 < l2_norm(change) <= 0.01 + 1e-6


def test_an_update_of_another_form_costs_its_site_the_round(table_study, wire, train) -> None:
    said = wire(table_study(SECURE, rounds=1))

    def spoil(asked, reply):
        if asked.kind == "round" and reply.site == "h1":
            return replace(reply, delta={"masked": reply.delta["masked"][:-1]})
        if asked.kind == "round" and reply.site == "h3":
            return replace(reply, n_cases=1000)
        return reply

    said.spoil = spoil
    plain = wire(table_study(None, rounds=1))
    plain.silent = {"round": ("h1", "h3")}
    outcome = train(said)
    assert outcome.records[0].left_out == {
        "h1": "masked update of another form",
        "h3": "more cases than announced",
    }
    assert largest_difference(train(plain).weights, outcome.weights) < 1e-6
