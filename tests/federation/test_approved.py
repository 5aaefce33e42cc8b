"""The training process finds a hospital only through its approvals."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context as FlowerContext
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from medfl.client import approved, consent, refusals, service
from medfl.client.approved import Approved
from medfl.client.book import Book
from medfl.client.cli import app
from medfl.client.composition import Charge
from medfl.client.data.check import check
from medfl.client.data.lineage import Used, lineage_path, rounds_with
from medfl.client.data.own import own_cohort
from medfl.client.flower import client_app
from medfl.client.hospital import answer
from medfl.client.premises import Enrolment, Home
from medfl.client.reading import Reading, site_word
from medfl.client.service import Disk
from medfl.client.site_file import SiteFile
from medfl.common import config, heads, study_text, tensors
from medfl.common.approvals import is_by, signed
from medfl.common.audit import Head
from medfl.common.coordination import Done
from medfl.common.errors import ConfigError, PolicyRefused, StorageError
from medfl.common.flower_records import from_record, to_record
from medfl.common.kept import save_record
from medfl.common.messages import Instruction, Reply, pack, unpack_reply
from medfl.common.private_files import is_full, private_folder
from medfl.common.receipts import asked_by, content_of, detach
from medfl.common.signing import load_key, new_key, public_of
from medfl.common.site import load_site
from medfl.common.statistics import Shared, statistics_to_plain
from medfl.common.study import SecureAggregation, Study

STUDY = {
    "name": "tiny",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a"}]},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": {"rounds": 1},
}


@dataclass
class Context:
    """As Flower hands it over."""

    run_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class World:
    finder: Approved
    study: Study
    table: Path

    def approve(self) -> None:
        site = load_site(self.finder.site_file)
        cohort = own_cohort(site, self.study)
        word = site_word(self.finder.home.signing_key(), site)
        reading = Reading(cohort.digest, len(cohort.positions("train")), word)
        consent.approve(self.finder.home, self.study, reading, 30)

    def find(self, digest: str = "") -> Any:
        return self.finder(Context({"study": digest or self.study.digest}))


@pytest.fixture
def world(tmp_path: Path) -> World:
    home = Home(private_folder(tmp_path / "state"))
    coordinator = new_key(tmp_path / "coordinator.key")
    new_key(home.signing_file)
    save_record(home.enrolment_file, Enrolment("north", "h:1", "T", public_of(coordinator), 0))
    study = config.parse(STUDY, Study, "test")
    made = study_text.publish(coordinator, study, 0)
    save_record(home.folder / "studies" / f"{study.digest}.json", made)
    table = tmp_path / "cases.csv"
    lines = [f"p{i},{i / 10},{'yes' if i % 3 else 'no'}" for i in range(30)]
    table.write_text("\n".join(["patient,a,label", *lines]))
    (tmp_path / "site.toml").write_text(
        'name = "other-name"\n[data]\nformat = "table"\npath = "cases.csv"\n'
    )
    argument = json.dumps({"state": str(home.folder), "site": str(tmp_path / "site.toml")})
    return World(approved.hospitals(argument), study, table)


def test_an_approved_study_finds_its_hospital_under_the_enrolled_name(world: World) -> None:
    world.approve()
    hospital = world.find()
    assert hospital.name == "north"
    assert hospital.study == world.study
    assert hospital.ledger_folder == load_site(world.finder.site_file).ledger
    assert not hospital.simulated
    assert world.find() is hospital


def test_a_site_toml_that_is_changed_stops_the_work_until_it_is_approved_again(
    world: World,
) -> None:
    """A client that had started before [privacy] was added trained 15 rounds without noise."""
    world.approve()
    assert world.find().privacy is None
    file = world.finder.site_file
    before = file.read_text()
    file.write_text(before + "[privacy]\nepsilon = 1.0\ndeclared_patients = 20\n")
    refused = asked_over_flower(world, prepare(world))
    assert refused.refusal == "no approval that holds at the hospital"
    (line,) = [x["about"] for x in world.finder.home.audit.lines() if x["what"] == "refused"]
    assert "site.toml has changed since the approval" in line["why"]
    world.approve()
    assert world.find().privacy.epsilon == 1.0
    file.write_text(before)  # and taking it away is a change as well
    with pytest.raises(PolicyRefused, match=r"site\.toml has changed"):
        world.find()


def test_a_site_toml_that_only_computes_elsewhere_is_taken_up_without_a_new_approval(
    world: World,
) -> None:
    world.approve()
    first = world.find()
    file = world.finder.site_file
    file.write_text('device = "cpu"\n' + file.read_text())
    assert world.find() is not first
    file.write_text(file.read_text() + "[nonsense\n")
    with pytest.raises(ConfigError):
        world.find()


def test_data_that_change_while_the_client_runs_stop_the_work(world: World) -> None:
    """The old table went on being trained on; its digest was what had been approved."""
    world.approve()
    world.find()
    text = world.table.read_text()
    world.table.write_text(text.replace("p0,0.0", "p0,7.0"))
    with pytest.raises(PolicyRefused, match="the data have changed since the approval"):
        world.find()
    world.table.write_text(text)
    assert len(world.find().cohort.cases) == 30


def test_a_patient_who_withdraws_while_the_client_runs_is_in_no_later_round(world: World) -> None:
    world.approve()
    world.find()
    file = str(world.finder.site_file)
    said = CliRunner().invoke(app, ["exclude", file, "p3"])
    assert said.exit_code == 0, said.output
    with pytest.raises(PolicyRefused, match="the data have changed since the approval"):
        world.find()
    world.approve()
    assert len(world.find().cohort.cases) == 29


def test_an_approval_from_before_site_toml_was_named_runs_nothing_and_says_so(
    world: World,
) -> None:
    world.approve()
    home = world.finder.home
    made = home.decision(world.study.digest)
    assert made is not None
    assert len(made.site_toml) == 64
    old = signed(home.signing_key(), replace(made, site_toml=""))
    assert is_by(public_of(home.signing_key()), old)
    save_record(home.decision_file(world.study.digest), old)
    with pytest.raises(PolicyRefused, match=r"names no site\.toml"):
        world.find()


def test_the_running_client_says_that_site_toml_has_changed_and_what_that_stops(
    world: World,
) -> None:
    world.approve()
    own = SiteFile(world.finder.home, world.finder.site_file)
    assert own.news() == []
    own.file.write_text(own.file.read_text() + "[policy]\nmin_cases = 3\n")
    (said,) = own.news()
    assert "has changed. Nothing runs for tiny until it is approved again" in said
    assert "medfl-client approve tiny" in said
    assert own.news() == []
    assert "is another than was approved" in SiteFile(own.home, own.file).news()[0]
    world.approve()
    assert SiteFile(own.home, own.file).news() == []
    own.file.write_text('device = "cpu"\n' + own.file.read_text())
    assert "it holds from the next question on" in own.news()[0]
    own.file.write_text("name =")
    assert "Nothing runs until" in own.news()[0]


def test_what_a_private_hospital_will_refuse_is_said_before_anybody_signs(world: World) -> None:
    """`check` was ready, `approve` signed, each run was refused, and only a log file said why."""
    file, home = world.finder.site_file, world.finder.home
    file.write_text(file.read_text() + "[privacy]\nepsilon = 8.0\ndeclared_patients = 20\n")
    there = ["--site", str(file), "--state", str(home.folder)]
    remedy = 'record.scale (write "range", with a range for each number)'
    run = CliRunner().invoke
    checked = run(app, ["check", str(file), "--study", "tiny", "--state", str(home.folder)])
    assert (checked.exit_code, remedy in checked.output) == (5, True), checked.output
    shown = run(app, ["show", "tiny", *there])
    assert "It would refuse every run of this study" in shown.output
    assert remedy in shown.output
    assert "Next: medfl-client approve" not in shown.output
    signed_ = run(app, ["approve", "tiny", "--yes", *there])
    assert isinstance(signed_.exception, PolicyRefused)
    assert home.decision(world.study.digest) is None
    world.approve()  # and what is foreseen is what is done
    with pytest.raises(PolicyRefused, match=re.escape(remedy)):
        answer(world.find(), prepare(world))


@pytest.mark.parametrize(
    ("site", "why"),
    [
        ('[policy]\ntasks = ["segmentation"]\n', "policy.tasks"),
        ("[policy]\nrequire_secure_aggregation = true\n", "requires secure aggregation"),
        ("[policy]\nmin_cases = 1000\n", "policy.min_cases"),
        ("[policy]\nsmallest_count = 1000\n", "policy.smallest_count"),
        ("[privacy]\nepsilon = 8.0\n", "privacy.declared_patients is missing"),
    ],
)
def test_each_rule_that_refuses_a_question_is_foreseen_by_the_check(
    world: World, site: str, why: str
) -> None:
    file = world.finder.site_file
    file.write_text(file.read_text() + site)
    found = check(load_site(file), world.study)
    assert found.exit_code == PolicyRefused.exit_code
    assert any(why in fault for fault in found.faults), found.faults
    world.approve()
    with pytest.raises(PolicyRefused, match=re.escape(why)):
        answer(world.find(), prepare(world))


def test_every_refusal_stays_in_the_status_with_its_reason_and_the_client_says_it(
    world: World,
) -> None:
    home = world.finder.home
    news = refusals.News(home)
    assert news.news() == []
    world.approve()
    for _ in range(7):
        asked_over_flower(world, with_weights(world, "round"))
    asked_over_flower(world, replace(prepare(world), round=3))
    said = news.news()
    assert ["tiny, 7 times" in said[0], "3 is not one of them" in said[1]] == [True, True], said
    assert news.news() == []
    found = refusals.by_reason(home.audit.lines())
    assert [each.times for each in found] == [7, 1]
    save_record(home.enrolment_file, replace(home.enrolment(), address="unix:/nowhere"))
    shown = CliRunner().invoke(app, ["status", "--state", str(home.folder)])
    assert "8 questions were refused here" in shown.output
    assert "this one did not begin here" in shown.output


def test_a_hospital_whose_numbers_are_unlike_the_others_is_told_so_in_round_1(
    world: World,
) -> None:
    """Here `a` goes from 0 to 2.9; the mean over all hospitals is 100, so the unit is another."""
    world.approve()
    asked_over_flower(world, prepare(world))
    shared = statistics_to_plain(Shared(means={"a": 100.0}, sds={"a": 1.0}))
    answered = asked_over_flower(world, replace(with_weights(world, "round"), shared=shared))
    assert answered.refusal == ""
    assert consent.unlike_others(world.finder.home, world.study.digest) == [
        "a: a mean far from the other hospitals'; in the same unit?"
    ]
    home = world.finder.home
    save_record(home.enrolment_file, replace(home.enrolment(), address="unix:/nowhere"))
    shown = CliRunner().invoke(app, ["status", "--state", str(home.folder)])
    assert "tiny: here is a: a mean far" in shown.output
    # A later run among hospitals like it takes the word back.
    asked_over_flower(world, prepare(world, "second"))
    asked_over_flower(world, replace(with_weights(world, "round"), run="second"))
    assert consent.unlike_others(home, world.study.digest) == []


def test_a_question_that_is_refused_again_and_again_fills_a_few_lines(world: World) -> None:
    """The first ten, then the hundredth: 11 lines for 150 questions, whatever the round."""
    world.approve()
    for number in range(150):
        asked = replace(prepare(world), round=number + 1, run=f"r{number}")
        world.finder.note_refusal(asked, f"The study has 1 rounds, and {number} is none.")
    lines = [e for e in world.finder.home.audit.lines() if e["what"] == "refused"]
    assert [e["about"]["times"] for e in lines] == [1] * 10 + [90]
    world.finder.note_refusal(prepare(world), "another reason")
    assert sum(r.times for r in refusals.by_reason(world.finder.home.audit.lines())) == 101


def test_an_approval_says_that_the_clocks_differ(world: World) -> None:
    world.approve()
    home = world.finder.home
    decision = home.decision(world.study.digest)
    assert decision is not None

    class Coordinator:
        """Answers ten minutes later than it is here."""

        def call(self, method: str, message: object, answer: type) -> Done:
            return Done(home.clock() + 600)

    said = consent.send(home, Coordinator(), decision)  # type: ignore[arg-type]
    assert "10 minutes behind the coordinator's" in said


def test_a_full_disk_is_told_and_waited_for_and_a_damaged_file_is_not(tmp_path: Path) -> None:
    said, stopping = list[str](), threading.Event()
    full = StorageError("audit.jsonl: cannot be written (No space left on device)")

    def hear(text: str) -> None:
        said.append(text)

    Disk(tmp_path, hear, stopping, pause_s=0.01).wait_for_room(full)
    assert ["is full" in said[0], "There is room" in said[1]] == [True, True]
    with pytest.raises(StorageError, match="is damaged"):
        Disk(tmp_path, hear, stopping).wait_for_room(StorageError("x.json: is damaged"))
    assert is_full(tmp_path, needed=2**62)
    assert not is_full(tmp_path, needed=0)


def test_a_disk_that_is_full_at_the_very_start_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was: the client ended, and went on only when somebody looked."""
    home, said, tries = world.finder.home, list[str](), [1, 1]
    record = Home.record

    def full(self: Home, what: str, **about: Any) -> None:
        if what == "client started" and tries:
            tries.pop()
            raise StorageError("audit.jsonl: cannot be written (No space left on device)")
        record(self, what, **about)

    monkeypatch.setattr(Home, "record", full)
    service._started(home, Disk(home.folder, said.append, threading.Event(), pause_s=0.01))
    assert [line["what"] for line in home.audit.lines()][-1] == "client started"
    assert sum("is full" in text for text in said) == 2


def test_a_hospital_signs_as_enrolled_and_knows_the_keys_that_are_pinned_and_approved(
    world: World,
) -> None:
    """A key that is pinned after the approval is that of a hospital which nobody has approved."""
    home = world.finder.home
    federation = replace(world.study.federation, min_sites=2)
    masks = SecureAggregation(range=1.0)
    secure = replace(world.study, federation=federation, secure_aggregation=masks)
    made = study_text.publish(new_key(home.folder / "c.key"), secure, 0)
    coordinator = public_of(load_key(home.folder / "c.key"))
    save_record(home.folder / "studies" / f"{secure.digest}.json", made)
    south, west = "ab" * 32, "cd" * 32
    known = replace(home.enrolment(), coordinator_key=coordinator, sites={"south": south})
    save_record(home.enrolment_file, known)
    world.study = secure
    world.approve()
    assert home.decision(secure.digest).sites == {"south": south}
    identity = world.find().identity
    assert identity.key_of("north") == public_of(identity.key) == public_of(home.signing_key())
    assert identity.key_of("south") == south
    save_record(home.enrolment_file, replace(known, sites={"south": south, "west": west}))
    assert identity.key_of("west") is None
    world.approve()
    assert identity.key_of("west") == west
    # Another key under a name that was approved is another hospital.
    save_record(home.enrolment_file, replace(known, sites={"south": west, "west": west}))
    assert identity.key_of("south") is None


def test_nothing_is_even_read_for_a_study_that_is_not_approved(world: World) -> None:
    world.table.unlink()
    for digest in (world.study.digest, "0" * 64, "../../etc", ""):
        with pytest.raises(PolicyRefused, match="Nothing is run for this study"):
            world.finder(Context({"study": digest}))
    assert asked_over_flower(world, prepare(world)).refusal
    (line,) = [x for x in world.finder.home.audit.lines() if x["what"] == "refused"]
    assert "not approved" in line["about"]["why"]


def test_a_hospital_that_only_evaluates_signs_for_no_training_case(world: World) -> None:
    file, home = world.finder.site_file, world.finder.home
    file.write_text(file.read_text() + "[policy]\nevaluate_only = true\n")
    site = load_site(file)
    cohort, word = own_cohort(site, world.study), site_word(home.signing_key(), site)
    signed_ = consent.approve(
        home, world.study, Reading(cohort.digest, 0, word, evaluates=True), 30
    )
    assert signed_.cases == 0
    verdict = consent.verdict(home, world.study.digest, site)
    assert verdict.startswith("approved for evaluation only until")
    there = ["--site", str(file), "--state", str(home.folder)]
    shown = CliRunner().invoke(app, ["show", "tiny", *there]).output
    assert "This hospital only evaluates" in shown
    assert "the change of the model's weights" not in shown
    assert answer(world.find(), prepare(world)).evaluates
    # Taking the key away would train on what was approved for evaluation.
    file.write_text(file.read_text().replace("true", "false"))
    with pytest.raises(PolicyRefused, match=r"site\.toml has changed"):
        world.find()


def test_a_withdrawal_holds_at_the_next_message(world: World) -> None:
    world.approve()
    world.find()
    consent.withdraw(world.finder.home, world.study.digest)
    with pytest.raises(PolicyRefused, match="withdrawn"):
        world.find()
    world.approve()
    world.find()


def test_data_that_changed_since_the_approval_are_not_trained_on(world: World) -> None:
    world.approve()
    world.table.write_text(world.table.read_text() + "\np99,1.0,yes")
    with pytest.raises(PolicyRefused, match="data have changed"):
        world.find()
    world.approve()
    world.find()


def test_cases_that_were_approved_anew_are_read_anew(world: World) -> None:
    world.approve()
    before = world.find()
    assert world.find() is before
    world.table.write_text(world.table.read_text() + "\np99,1.0,yes")
    world.approve()
    after = world.find()
    assert len(after.cohort.cases) == len(before.cohort.cases) + 1
    assert world.find() is after


def test_a_study_altered_on_the_hospitals_disk_is_refused(world: World) -> None:
    world.approve()
    file = world.finder.home.folder / "studies" / f"{world.study.digest}.json"
    file.write_bytes(file.read_bytes().replace(b"tiny", b"huge"))
    with pytest.raises(PolicyRefused, match="not signed by the coordinator"):
        world.find()


def test_nothing_is_run_on_a_ledger_that_was_put_back(world: World) -> None:
    world.approve()
    hospital, home = world.find(), world.finder.home
    charge = Charge(world.study.digest, "tiny", "r", "training", 1, 4.0, 0.5, 5)
    hospital.ledger.reserve(charge, ["a", "b"])
    word = hospital.ledger.sealed("T\x1fnorth\x1f1")
    shown = heads.witness(home.signing_key(), "ledger:north", "north", Head(1, word), 0)
    save_record(home.folder / "ledger_shown.json", shown)
    world.find()
    (hospital.ledger.folder / "ledger.jsonl").unlink()
    (hospital.ledger.folder / "key").unlink()
    with pytest.raises(PolicyRefused, match="begun anew"):
        world.find()


def test_a_ledger_put_back_between_two_exchanges_is_noticed_as_well(world: World) -> None:
    world.approve()
    hospital = world.find()
    charge = Charge(world.study.digest, "tiny", "r", "training", 1, 4.0, 0.5, 5)
    hospital.ledger.reserve(charge, ["a", "b"])
    early = (hospital.ledger.folder / "ledger.jsonl").read_bytes()
    hospital.ledger.reserve(replace(charge, round=2), ["a", "b"])
    asked = Instruction(kind="round", study_digest=world.study.digest, run="r", round=2)
    world.finder.seal("{}", asked, pack(Reply(site="north", round=2)))
    late = (hospital.ledger.folder / "ledger.jsonl").read_bytes()
    (hospital.ledger.folder / "ledger.jsonl").write_bytes(early)
    for _ in range(2):
        with pytest.raises(PolicyRefused, match="when this hospital last answered"):
            world.find()
        # The refusal is an answer too.
        world.finder.seal("{}", asked, pack(Reply(site="north", round=2, refusal="no")))
    (hospital.ledger.folder / "ledger.jsonl").write_bytes(late)
    world.find()


def test_each_answer_is_sealed_and_noted(world: World) -> None:
    asked = Instruction(kind="round", study_digest=world.study.digest, run="r", round=3)
    envelope = pack(Reply(site="north", round=3))
    sealed = world.finder.seal("{}", asked, envelope)
    bare, found = detach(sealed)
    assert found is not None
    assert (found.site, found.round, found.kind, found.run) == ("north", 3, "round", "r")
    assert (found.asked, found.content) == (asked_by("{}"), content_of(envelope))
    assert content_of(bare) == content_of(envelope)
    (line,) = world.finder.home.audit.lines()
    assert line["about"]["content"] == found.content


def test_an_update_is_in_the_lineage_before_it_leaves(world: World) -> None:
    world.approve()
    hospital = world.find()
    asked = Instruction("round", world.study.digest, "r", round=2, model="m1")
    delta = {"w": np.zeros(1, np.float32)}
    path = lineage_path(load_site(world.finder.site_file))
    for nothing in (pack(Reply(site="north")), pack(Reply(site="north", refusal="out of memory"))):
        world.finder.seal("{}", asked, nothing)
    world.finder.seal("{}", Instruction("finish", world.study.digest, "r"), pack(Reply("north")))
    assert not path.exists()
    world.finder.seal("{}", asked, pack(Reply(site="north", delta=delta)))
    patient = hospital.patients("train")[0]
    assert rounds_with(path, patient) == (
        Used(world.study.digest, "r", hospital.cohort.digest, 2, "m1"),
    )
    assert rounds_with(path, hospital.patients("test")[0]) == ()
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="lineage"):
        world.finder.seal("{}", asked, pack(Reply(site="north", delta=delta)))


def test_a_study_that_had_a_gpu_does_not_go_on_without_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    site = tmp_path / "site.toml"
    data = '[data]\nformat = "table"\npath = "cases.csv"\n'
    site.write_text(f'name = "north"\n{data}')
    assert approved.device_of(load_site(site), tmp_path) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert approved.device_of(load_site(site), tmp_path) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PolicyRefused, match="none can be used now"):
        approved.device_of(load_site(site), tmp_path)
    site.write_text(f'name = "north"\ndevice = "cpu"\n{data}')
    assert approved.device_of(load_site(site), tmp_path) == "cpu"


def test_nothing_is_begun_on_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    world.approve()
    true = os.statvfs(world.finder.home.folder)
    full = os.statvfs_result([*true[:4], 0, *true[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(StorageError, match="the disk is full"):
        world.find()


def test_a_new_run_starts_without_what_the_last_one_left(world: World) -> None:
    world.approve()
    hospital = world.find()
    answer(hospital, prepare(world, "first"))
    hospital.state.mkdir()
    left = hospital.state / "control.safetensors"
    left.write_bytes(b"x")
    answer(world.find(), prepare(world, "first"))
    assert left.exists()
    # A run that is not admitted is none, and drops nothing.
    with pytest.raises(PolicyRefused):
        answer(world.find(), replace(prepare(world, "second"), kind="round", round=1))
    assert left.exists()
    answer(world.find(), prepare(world, "second"))
    assert not left.exists()


# --- the book of questions: what a coordinator may ask -----------------------------------------


def prepare(world: World, run: str = "r") -> Instruction:
    return Instruction(kind="prepare", study_digest=world.study.digest, run=run)


def weights(value: float = 0.0) -> dict[str, Any]:
    return {"1.weight": np.full((1, 1), value, np.float32), "1.bias": np.zeros(1, np.float32)}


def with_weights(world: World, kind: Any, value: float = 0.0, **more: Any) -> Instruction:
    parts = more.pop("parts", ("validation",) if kind == "round" else ("validation", "test"))
    asked = replace(prepare(world), kind=kind, round=1, parts=parts, weights=weights(value), **more)
    shared = statistics_to_plain(Shared(means={"a": 0.0}, sds={"a": 1.0}))
    return replace(asked, shared=shared, model=tensors.digest(asked.weights))


def asked_over_flower(world: World, asked: Instruction) -> Reply:
    """As a message of Flower's, through the app that the training process runs."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    types = {"prepare": "query.prepare", "round": "train.round", "finish": "evaluate.finish"}
    message = Message(to_record(pack(asked)), 1, types[asked.kind])
    proto = message_from_proto(message_to_proto(message))
    context = FlowerContext(1, 1, {}, RecordDict(), {"study": world.study.digest})
    answered = client_app(world.finder)(proto, context)
    return unpack_reply(detach(from_record(answered.content))[0])


def restarted(world: World) -> World:
    """The training process died and another one took its place."""
    return replace(world, finder=Approved(world.finder.home, world.finder.site_file, "north"))


def test_a_hospital_answers_a_whole_run_and_nothing_that_no_run_needs(world: World) -> None:
    """A hostile coordinator asked for metrics on weights of its choice until it had all labels."""
    world.approve()
    for stranger in (with_weights(world, "round"), with_weights(world, "finish", run="x")):
        assert asked_over_flower(world, stranger).refusal
    told = [
        asked_over_flower(world, asked)
        for asked in (
            prepare(world),
            with_weights(world, "round"),
            with_weights(world, "finish", 1.0, parts=("validation",)),
            with_weights(world, "finish", 1.0),
        )
    ]
    assert [r.refusal for r in told] == [""] * 4
    assert told[1].delta
    assert set(told[3].metrics) == {"validation", "test"}
    world = restarted(world)
    refused = {
        "round 50": replace(with_weights(world, "round"), round=50),
        "round 0": replace(with_weights(world, "round"), round=0),
        "another model": with_weights(world, "round", 0.5),
        "another evaluation": with_weights(world, "finish", 0.5),
        "the training part": with_weights(world, "finish", 1.0, parts=("train",)),
        "test alone": with_weights(world, "finish", 1.0, parts=("test",)),
        "another digest": replace(with_weights(world, "round"), weights=weights(0.25)),
        "another seed": replace(prepare(world), seed=5),
        "weights with prepare": replace(prepare(world), weights=weights()),
        "no name": prepare(world, ""),
        "a name of three lines": prepare(world, "a\nb\nc"),
    }
    found = {what: asked_over_flower(world, asked).refusal for what, asked in refused.items()}
    assert found == dict.fromkeys(refused, "not allowed by the hospital's policy")
    lines = [x["about"] for x in world.finder.home.audit.lines() if x["what"] == "refused"]
    assert len(lines) == 2 + len(refused)
    assert any("1 rounds, and 50 is not one of them" in x["why"] for x in lines)
    answered = [x for x in world.finder.home.audit.lines() if x["what"] == "answered"]
    assert len(answered) == 4
    # And a person sees it (at a divided hospital, where no certificate lies here).
    home = world.finder.home
    save_record(home.enrolment_file, replace(home.enrolment(), address="unix:/nowhere"))
    said = CliRunner().invoke(app, ["status", "--state", str(home.folder)])
    assert f"{len(lines)} questions were refused" in said.stdout, said.output


def test_the_same_question_gets_the_same_answer_also_from_the_next_process(world: World) -> None:
    """A coordinator that died asks again under a new attempt."""
    world.approve()
    asked_over_flower(world, prepare(world))
    first = asked_over_flower(world, with_weights(world, "round"))
    again = asked_over_flower(restarted(world), replace(with_weights(world, "round"), attempt=1))
    assert first.refusal == again.refusal == ""
    assert tensors.digest(first.delta) == tensors.digest(again.delta)
    assert first.metrics == again.metrics
    book = world.find().book
    assert book is not None
    assert len(book.journal.lines()) == 2


def test_a_run_that_was_taken_up_from_an_earlier_round_is_asked_otherwise_a_few_times(
    world: World,
) -> None:
    world.approve()
    asked_over_flower(world, prepare(world))
    assert not asked_over_flower(world, with_weights(world, "round")).refusal
    for attempt in (1, 2, 3, 4):
        asked = with_weights(world, "round", attempt / 10, attempt=attempt)
        assert bool(asked_over_flower(world, asked).refusal) is (attempt == 4)


def test_an_approval_allows_a_stated_number_of_runs_and_a_new_one_as_many(world: World) -> None:
    file = world.finder.site_file
    file.write_text(file.read_text() + "[policy]\nruns_per_approval = 2\n")
    world.approve()
    refusals = [asked_over_flower(world, prepare(world, run)).refusal for run in "abac"]
    assert refusals == ["", "", "", "not allowed by the hospital's policy"]
    assert asked_over_flower(restarted(world), prepare(world, "c")).refusal
    hospital = world.find()
    assert hospital.book is not None
    home = world.finder.home
    assert hospital.book.used_up(consent.number(home, world.study.digest))
    before = home.decision(world.study.digest)
    assert before is not None
    n = len(hospital.cohort.positions("train"))
    reading = Reading(hospital.cohort.digest, n, before.site_toml)
    made = consent.approve(home, world.study, reading, 30, anew=True)
    assert made.at > before.at
    assert not asked_over_flower(world, prepare(world, "c")).refusal


def test_a_question_is_on_the_disk_before_it_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    hospital = world.find()
    synced = []
    true = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), true(handle))[1])
    answer(hospital, prepare(world))
    assert synced
    book = hospital.folder / "book.jsonl"
    assert book.stat().st_mode & 0o077 == 0
    # A crash in the middle of a line; the line was never answered.
    book.write_bytes(book.read_bytes() + b'{"run":"r","appro')
    assert not asked_over_flower(restarted(world), with_weights(world, "round")).refusal
    assert [x.slot for x in Book.at(book, world.study, 1).journal.lines()] == [
        "prepare 0",
        "round 1",
    ]
    book.write_bytes(b"x" + book.read_bytes())
    assert (
        asked_over_flower(restarted(world), prepare(world)).refusal == "disk full or damaged file"
    )
