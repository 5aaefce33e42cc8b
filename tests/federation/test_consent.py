"""A hospital's word: what it is asked in plain words, what it signs, and what that allows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from medfl.client import consent, words
from medfl.client.consent import Refusal, allowed
from medfl.client.premises import Enrolment, Home
from medfl.client.reading import Reading
from medfl.common import config, study_text
from medfl.common.approvals import Decision, is_by, signed
from medfl.common.coordination import AskStudies, Decide, Done, Published, Studies
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.kept import save_record
from medfl.common.private_files import private_folder
from medfl.common.signing import key_fingerprint, load_key, new_key, public_of
from medfl.common.site import Policy, SitePrivacy
from medfl.common.site import Site as SiteFile
from medfl.common.source import DataSource
from medfl.common.study import Privacy, Study
from medfl.server import authority, runs, studies
from medfl.server.federation import Federation, SiteRecord
from medfl.server.settings import ServerSettings, open_federation

START = 1_800_000_000.0
DAY = 86400
COHORT, OTHER = "c" * 64, "d" * 64
STUDY = {
    "name": "lung",
    "title": "Pneumonia on chest films",
    "purpose": "Find pneumonia",
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "image": {"dimensions": 2, "size": [28, 28]},
    "model": {"name": "cnn", "options": {"channels": [4, 8], "dropout": 0.1}},
    "training": {"local_steps": 4},
    "federation": {"rounds": 5, "min_sites": 2, "strategy": "fedprox", "options": {"mu": 1.0}},
}


@dataclass
class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """Both sides without a wire: what one sends, the other is handed."""

    federation: Federation
    home: Home
    clock: Clock

    def call(self, method: str, message: object, answer: type) -> object:
        """As `medfl.client.coordinator.Line.call`."""
        if isinstance(message, AskStudies):
            others = {s.name: s.signing_key for s in self.federation.sites() if s.name != "a"}
            return Studies(self.clock(), tuple(studies.published(self.federation)), others)
        assert isinstance(message, Decide)
        record = self.federation.site("a")
        assert record is not None
        studies.decide(self.federation, record, message.decision)
        return Done(self.clock())


def study(**changed: object) -> Study:
    return config.parse({**STUDY, **changed}, Study, "test")


@pytest.fixture
def world(tmp_path: Path) -> World:
    clock = Clock()
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), clock())
    federation = open_federation(tmp_path / "fed", clock)
    home = Home(private_folder(tmp_path / "a"), clock)
    key = new_key(home.signing_file)
    coordinator = public_of(federation.signing_key())
    save_record(home.enrolment_file, Enrolment("a", "h:1", "Test", coordinator, int(START)))
    record = SiteRecord("a", "active", "0" * 64, START + 90 * DAY, public_of(key), int(START))
    save_record(federation.state / "sites" / "a.json", record)
    return World(federation, home, clock)


@pytest.fixture
def known(world: World) -> Study:
    """A study that is published and has been fetched."""
    studies.publish(world.federation, study())
    consent.fetch(world.home, world)  # type: ignore[arg-type]
    return consent.find(world.home, "lung")[1]


def why(world: World, digest: str, cohort: str | None = COHORT) -> str:
    answer = allowed(world.home, digest, cohort)
    return answer.why if isinstance(answer, Refusal) else ""


def approve(world: World, known: Study, days: float = 30) -> Decision:
    return consent.approve(world.home, known, Reading(COHORT, 12), days)


def test_a_study_travels_without_changing_its_digest(root: Path) -> None:
    from medfl.common.study import load_study

    for path in sorted((root / "simulations" / "studies").glob("*.toml")):
        original = load_study(path)
        assert study_text.from_text(study_text.to_text(original)).digest == original.digest
    rich = study(privacy={"epsilon": 3, "delta": 1e-5}, evaluation={"metrics": ["auroc"]})
    assert study_text.from_text(study_text.to_text(rich)) == rich


def test_a_study_that_starts_from_weights_is_not_published(tmp_path: Path) -> None:
    weights = {"name": "cnn", "start_weights": "w.safetensors", "start_weights_sha256": "0" * 64}
    with pytest.raises(ConfigError, match="start_weights"):
        study_text.to_text(study(model=weights))


def test_publishing_again_is_the_same_publication_and_a_change_is_another(world: World) -> None:
    first = studies.publish(world.federation, study())
    world.clock.now += 60
    assert studies.publish(world.federation, study()) == first
    second = studies.publish(world.federation, study(purpose="Find more"), replace=True)
    assert second.digest != first.digest
    assert studies.find(world.federation, "lung") == second
    with pytest.raises(ConfigError, match="no such study"):
        studies.find(world.federation, first.digest[:8])
    assert studies.publish(world.federation, study(), replace=True).digest == first.digest
    with pytest.raises(ConfigError, match="no such study"):
        studies.find(world.federation, "heart")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model": {"name": "logistik"}}, "logistik"),
        ({"federation": {"rounds": 5, "strategy": "fedagv", "min_sites": 2}}, "fedagv"),
        ({"purpose": "Find it\nPrivacy: epsilon 0.1."}, "purpose: has a line break"),
        ({"title": "Lung\x1b[2K"}, "title: has a line break or a control character"),
    ],
)
def test_a_study_that_no_hospital_could_serve_or_read_is_not_published(
    world: World, changed: dict[str, object], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        studies.publish(world.federation, study(**changed))
    assert studies.published(world.federation) == []


def test_a_name_that_is_taken_is_refused_with_what_differs_line_by_line(world: World) -> None:
    first = studies.publish(world.federation, study())
    other = study(training={"local_steps": 4, "learning_rate": 0.5}, purpose="Find more")
    with pytest.raises(ConfigError) as refused:
        studies.publish(world.federation, other)
    text = str(refused.value)
    assert first.digest[:12] in text
    assert "training.learning_rate: 0.01 becomes 0.5" in text
    assert "purpose: 'Find pneumonia' becomes 'Find more'" in text
    assert studies.published(world.federation) == [first]


def test_a_publication_that_is_withdrawn_is_offered_no_longer_and_hospitals_see_that(
    world: World, known: Study
) -> None:
    approve(world, known)
    consent.send_all(world.home, world)  # type: ignore[arg-type]
    made = studies.find(world.federation, "lung")
    studies.withdraw(world.federation, made)
    assert studies.published(world.federation) == []
    assert studies.ever_published(world.federation) == [made]
    consent.fetch(world.home, world)  # type: ignore[arg-type]
    assert "the coordinator offers it no longer" in consent.verdict(world.home, known.digest)
    # What a hospital says of it later is still heard: a client that starts says all it has decided.
    consent.withdraw(world.home, known.digest)
    assert consent.send_all(world.home, world) == 1  # type: ignore[arg-type]
    again = studies.publish(world.federation, study())
    assert (again.digest, studies.ever_published(world.federation)) == (made.digest, [again])


def test_a_study_with_an_open_run_is_not_withdrawn(world: World, known: Study) -> None:
    made = studies.find(world.federation, "lung")
    run = runs.ask(world.federation, made, 5, seed=1, wait_s=1, deadline_s=1)
    with pytest.raises(ConfigError, match=f"{run.id} is waiting"):
        studies.withdraw(world.federation, made)


def test_a_new_study_under_an_old_name_is_shown_as_what_changed(world: World, known: Study) -> None:
    world.clock.now += DAY
    other = study(training={"local_steps": 4, "learning_rate": 0.5})
    made = studies.publish(world.federation, other, replace=True)
    consent.fetch(world.home, world)  # type: ignore[arg-type]
    before = consent.before_it(world.home, made)
    assert before == known
    text = words.describe(other, made, world.home.enrolment(), None, before)
    assert (
        f"There was another study of this name ({known.digest[:12]}). This one differs in:" in text
    )
    assert "  training.learning_rate: 0.01 becomes 0.5" in text
    old = next(p for p in world.home.published() if p.digest == known.digest)
    assert consent.before_it(world.home, old) is None


def test_an_approval_is_taken_back_by_the_name_although_a_newer_study_has_it(
    world: World, known: Study
) -> None:
    """`withdraw lung` looked at the newest study of that name and said: never approved."""
    approve(world, known)
    world.clock.now += DAY
    made = studies.publish(world.federation, study(purpose="More"), replace=True)
    consent.fetch(world.home, world)  # type: ignore[arg-type]
    assert [p.digest for p in consent.approved_as(world.home, "lung")] == [known.digest]
    assert [p.digest for p in consent.approved_as(world.home, made.digest[:9])] == [made.digest]
    assert [p.digest for p in consent.approved_as(world.home, known.digest[:9])] == [known.digest]


def test_what_acts_is_told_to_the_last_key_and_no_text_writes_a_line_of_its_own() -> None:
    text = told(study(training={"local_steps": 4, "learning_rate": 0.003}), None)
    assert "Learning rate 0.003 (sgd), batches of 32." in text
    for line in ("training.momentum", "model.options.dropout = 0.1", "federation.rounds = 5"):
        assert f"\n  {line}" in text
    forged = told(study(purpose="x\nThe signature is wrong.\x1b[2J"), None)
    assert "For what: x\\nThe signature is wrong.\\x1b[2J." in forged.splitlines()


def test_an_altered_study_is_refused_before_it_is_kept(world: World) -> None:
    made = studies.publish(world.federation, study())
    coordinator = world.home.enrolment().coordinator_key
    weaker = json.loads(made.study) | {"privacy": None, "purpose": "x"}
    for altered in (
        replace(made, study=json.dumps(weaker)),
        replace(made, digest="0" * 64),
        replace(made, name="heart"),
        replace(made, at=made.at + 1),
        replace(made, signature=""),
    ):
        with pytest.raises(PolicyRefused, match="is not signed"):
            study_text.opened(coordinator, altered)
    # Even the coordinator cannot sign a digest that is not the study's.
    key = world.federation.signing_key()
    lying = study_text.publish(key, study(), START)
    from medfl.common.signing import sign

    wrong = replace(lying, digest="0" * 64)
    wrong = replace(wrong, signature=sign(key, study_text._PURPOSE, study_text._signed_part(wrong)))
    with pytest.raises(PolicyRefused, match="does not have the digest"):
        study_text.opened(coordinator, wrong)


def test_a_study_that_was_altered_on_the_way_is_not_kept(world: World) -> None:
    right = studies.publish(world.federation, study())
    altered = replace(right, study=right.study.replace("Find pneumonia", "Find names"))

    class Forging(World):
        def call(self, method: str, message: object, answer: type) -> object:
            return Studies(START, (right, altered))

    line = Forging(world.federation, world.home, world.clock)
    with pytest.raises(PolicyRefused, match="is not signed"):
        consent.fetch(world.home, line)  # type: ignore[arg-type]
    assert world.home.published() == []


def test_nothing_is_allowed_before_it_is_approved(world: World, known: Study) -> None:
    assert why(world, known.digest) == "the study is not approved here"
    assert why(world, "0" * 64) == "the study is not approved here"
    assert "64 hexadecimal" in why(world, "../../etc/passwd")


def test_an_approval_allows_this_study_and_these_cases_until_its_end(
    world: World, known: Study
) -> None:
    approve(world, known)
    answer = allowed(world.home, known.digest, COHORT)
    assert isinstance(answer, Decision)
    assert (answer.cases, answer.expires - answer.at) == (12, 30 * DAY)
    assert why(world, known.digest, None) == ""
    assert why(world, known.digest, OTHER) == "the data have changed since the approval"
    assert why(world, study(purpose="other").digest) == "the study is not approved here"
    world.clock.now += 30 * DAY - 1
    assert why(world, known.digest) == ""
    world.clock.now += 1
    assert why(world, known.digest) == "the approval has expired"


def test_a_withdrawal_holds_at_once_also_offline_and_can_be_undone(
    world: World, known: Study
) -> None:
    approve(world, known)
    consent.withdraw(world.home, known.digest)
    assert why(world, known.digest) == "the approval was withdrawn"
    assert why(world, known.digest, None) == "the approval was withdrawn"
    approve(world, known)
    assert why(world, known.digest) == ""
    whats = [line["what"] for line in world.home.audit.lines()]
    assert whats == ["study heard of", "approved", "withdrawn", "approved"]


def test_what_was_never_approved_cannot_be_withdrawn(world: World, known: Study) -> None:
    with pytest.raises(ConfigError, match="never approved"):
        consent.withdraw(world.home, known.digest)


def test_approving_again_changes_nothing_unless_the_cases_did(world: World, known: Study) -> None:
    first = approve(world, known)
    world.clock.now += 60
    assert approve(world, known) == first
    assert consent.approve(world.home, known, Reading(OTHER, 12), 30) != first
    assert consent.withdraw(world.home, known.digest) == consent.withdraw(world.home, known.digest)


def test_a_private_hospitals_approval_names_its_cases_by_a_word_that_tells_nothing(
    world: World, known: Study
) -> None:
    def signed_for(cohort: str) -> Decision:
        world.clock.now += DAY
        return consent.approve(world.home, known, Reading(cohort, 12, blind=True), 30)

    plain = consent.approve(world.home, known, Reading(COHORT, 12), 30)
    assert plain.cohort == COHORT
    first, other, first_again = signed_for(COHORT), signed_for(OTHER), signed_for(COHORT)
    words = {d.cohort for d in (first, other, first_again)}
    # The same cases under another word: whether anybody came or went cannot be read from two.
    assert len(words) == 3
    assert not words & {COHORT, OTHER}
    assert isinstance(allowed(world.home, known.digest, COHORT), Decision)
    assert why(world, known.digest, OTHER) == "the data have changed since the approval"
    world.clock.now += 60
    assert consent.approve(world.home, known, Reading(COHORT, 12, blind=True), 30) == first_again
    # Neither the audit log, whose head the coordinator signs, nor the coordinator has the digest.
    private = [line for line in world.home.audit.lines() if line["what"] == "approved"][1:]
    assert not {COHORT, OTHER} & {line["about"]["cohort"] for line in private}
    consent.send(world.home, world, first_again)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"expires": int(START) + 999 * DAY},
        {"cohort": OTHER},
        {"cases": 1000},
        {"verdict": "approved", "at": int(START) + 1},
        {"study": "e" * 64},
        {"site": "b"},
        {"signature": ""},
    ],
)
def test_an_approval_edited_on_the_disk_allows_nothing(
    world: World, known: Study, change: dict[str, object]
) -> None:
    made = approve(world, known)
    edited = replace(made, **change)  # type: ignore[arg-type]
    save_record(world.home.decision_file(known.digest), edited)
    assert "was changed" in why(world, known.digest, edited.cohort)


def test_an_approval_of_another_study_copied_over_allows_nothing(
    world: World, known: Study
) -> None:
    made = approve(world, known)
    other = study(purpose="other")
    save_record(world.home.decision_file(other.digest), made)
    assert why(world, other.digest) == "the approval is for another study"


def test_an_approval_file_that_others_can_write_is_refused(world: World, known: Study) -> None:
    approve(world, known)
    world.home.decision_file(known.digest).chmod(0o666)
    assert "chmod 600" in why(world, known.digest)


@pytest.mark.parametrize("days", [0, -1, 2000])
def test_an_approval_has_an_end(world: World, known: Study, days: float) -> None:
    with pytest.raises(ConfigError, match="--days"):
        approve(world, known, days)


def test_the_coordinator_asks_only_sites_that_have_approved(world: World, known: Study) -> None:
    def counted() -> list[str]:
        return sorted(studies.approvals(world.federation, known.digest))

    assert counted() == []
    made = approve(world, known)
    assert counted() == []
    consent.send(world.home, world, made)  # type: ignore[arg-type]
    consent.send(world.home, world, made)  # type: ignore[arg-type]
    assert counted() == ["a"]
    consent.send(world.home, world, consent.withdraw(world.home, known.digest))  # type: ignore[arg-type]
    assert counted() == []
    with pytest.raises(PolicyRefused, match="a replay"):
        consent.send(world.home, world, made)  # type: ignore[arg-type]
    assert counted() == []
    approve(world, known)
    assert consent.send_all(world.home, world) == 1  # type: ignore[arg-type]
    assert counted() == ["a"]
    world.clock.now += 31 * DAY
    assert counted() == []


def test_a_revoked_sites_approval_does_not_count(world: World, known: Study) -> None:
    consent.send(world.home, world, approve(world, known))  # type: ignore[arg-type]
    authority.revoke(world.federation, "a", "")
    assert studies.approvals(world.federation, known.digest) == {}


def test_the_coordinator_refuses_what_the_site_did_not_sign(
    world: World, known: Study, tmp_path: Path
) -> None:
    made = approve(world, known)
    record = world.federation.site("a")
    assert record is not None
    other = new_key(tmp_path / "other.key")
    for wrong in (
        signed(other, made),
        replace(made, cases=999),
        signed(world.home.signing_key(), replace(made, site="b")),
    ):
        with pytest.raises(PolicyRefused, match="not signed by the key"):
            studies.decide(world.federation, record, wrong)
    unknown = signed(world.home.signing_key(), replace(made, study="e" * 64))
    with pytest.raises(PolicyRefused, match="not published"):
        studies.decide(world.federation, record, unknown)
    path = signed(world.home.signing_key(), replace(made, study="../../keys"))
    with pytest.raises(PolicyRefused, match="64 hexadecimal"):
        studies.decide(world.federation, record, path)
    endless = signed(world.home.signing_key(), replace(made, expires=int(START) + 5000 * DAY))
    with pytest.raises(PolicyRefused, match="has no end"):
        studies.decide(world.federation, record, endless)


def site_file(**more: object) -> SiteFile:
    data = DataSource(format="image", path=Path("x"))
    return SiteFile(name="a", data=data, **more)  # type: ignore[arg-type]


def told(shown: Study, site: SiteFile | None) -> str:
    made = Published(shown.name, shown.digest, "", int(START))
    return "\n".join(words.describe(shown, made, Enrolment("a", "h:1", "Test", "", 0), site))


def test_a_study_is_told_in_words() -> None:
    text = told(study(), site_file(policy=Policy(round_metrics_to=2)))
    for phrase in (
        "Pneumonia on chest films",
        "Who asks: the coordinator of Test, on 2027-01-15",
        "For what: Find pneumonia",
        "images, prepared as 2-D arrays of 28 x 28",
        "5 rounds; in each, 4 optimiser steps",
        "At least 2 hospitals",
        "code that a coordinator sends is never run",
        "rounded to 2 decimals",
        "What never leaves",
        "no differential privacy",
    ):
        assert phrase in text


def test_the_privacy_that_is_told_is_the_stricter_one() -> None:
    asked = Privacy(epsilon=8, delta=1e-5)
    text = told(replace(study(), privacy=asked), site_file(privacy=SitePrivacy(epsilon=2)))
    assert "epsilon 2," in text
    assert "this hospital's own limit" in text
    text = told(replace(study(), privacy=asked), site_file(privacy=SitePrivacy(epsilon=20)))
    assert "epsilon 8," in text
    assert "own limit" not in text


def test_sums_are_told_only_where_they_leave() -> None:
    federated = {"dimensions": 2, "size": [28, 28], "intensity": "federated"}
    assert "sums over the training cases" in told(study(image=federated), None)
    assert "no sums" in told(study(), None)


# --- who may be in a secure sum ----------------------------------------------------------------

SECURE = {"secure_aggregation": {"range": 1.0}}


def enrolled(world: World, name: str) -> SiteRecord:
    """Another site's record, with a key of its own."""
    first = world.federation.site("a")
    assert first is not None
    key = new_key(world.home.folder / f"{name}.key")
    record = replace(first, name=name, signing_key=public_of(key))
    save_record(world.federation.state / "sites" / f"{name}.json", record)
    return record


def test_an_approval_of_a_secure_sum_names_the_hospitals_that_were_known_then(
    world: World,
) -> None:
    published = studies.publish(world.federation, study(**SECURE))
    line: Any = world
    consent.fetch(world.home, line)
    found = consent.find(world.home, published.digest[:8])[1]
    with pytest.raises(ConfigError, match="would name 0 beside this one"):
        consent.approve(world.home, found, Reading(COHORT, 12), 30)
    keys = {name: enrolled(world, name).signing_key for name in ("b", "c")}
    consent.fetch(world.home, line)
    decision = consent.approve(world.home, found, Reading(COHORT, 12), 30)
    assert decision.sites == keys
    told = "\n".join(words.describe(found, published, world.home.enrolment(), None))
    assert all(f"{name}: {key_fingerprint(key)}" in told for name, key in keys.items())
    # An invented hospital comes later: it is in no approval, and a new one is another word.
    enrolled(world, "ghost")
    consent.fetch(world.home, line)
    kept = world.home.decision(found.digest)
    assert kept is not None
    assert "ghost" not in kept.sites
    world.clock.now += 1
    only = consent.approve(world.home, found, Reading(COHORT, 12), 30, ["b"])
    assert only.sites == {"b": keys["b"]}
    with pytest.raises(ConfigError, match="no key of nobody"):
        consent.approve(world.home, found, Reading(COHORT, 12), 30, ["nobody"])
    with pytest.raises(ConfigError, match="A sum needs 3 hospitals here"):
        consent.summed_with(world.home, found, ["b"], fewest=3)
    # The names are under the signature.
    forged = replace(only, sites=keys)
    assert is_by(public_of(world.home.signing_key()), only)
    assert not is_by(public_of(world.home.signing_key()), forged)


def test_a_plain_study_names_nobody(world: World, known: Study) -> None:
    enrolled(world, "b")
    assert approve(world, known).sites == {}


def test_the_coordinator_sums_only_hospitals_that_have_approved_each_other(world: World) -> None:
    """c enrolled and approved last; a and b had approved without it."""
    published = studies.publish(world.federation, study(**SECURE))
    keys = {"a": public_of(world.home.signing_key())}
    records = {name: enrolled(world, name) for name in ("b", "c")}
    keys |= {name: record.signing_key for name, record in records.items()}

    def decide(name: str, at: int, *others: str) -> None:
        made = Decision(
            "approved", name, published.digest, COHORT, 10, at, at + DAY,
            {other: keys[other] for other in others},
        )  # fmt: skip
        own = world.home.signing_file if name == "a" else world.home.folder / f"{name}.key"
        record = world.federation.site(name)
        assert record is not None
        studies.decide(world.federation, record, signed(load_key(own), made))

    now = int(world.clock())
    decide("a", now, "b")
    decide("b", now + 1, "a")
    decide("c", now + 2, "a", "b")
    assert set(studies.approvals(world.federation, published.digest)) == {"a", "b"}
    left_out = studies.unsummed(world.federation, published.digest)
    assert set(left_out) == {"c"}
    assert "not in one sum with a, b" in left_out["c"]
    decide("a", now + 3, "b", "c")
    decide("b", now + 4, "a", "c")
    assert set(studies.approvals(world.federation, published.digest)) == {"a", "b", "c"}
