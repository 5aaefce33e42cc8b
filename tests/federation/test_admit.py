"""What counts as an answer: sealed by the pinned key, approved, for the cases approved, once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.common.approvals import Decision, signed
from medfl.common.errors import FederationError, NotAdmitted, PolicyRefused
from medfl.common.kept import save_record
from medfl.common.messages import Envelope, Instruction, Reply, pack
from medfl.common.receipts import Seal, Seen, asked_by, attach, content_of, seal
from medfl.common.signing import SigningKey, new_key, public_of
from medfl.server import authority
from medfl.server.admit import Door
from medfl.server.federation import SiteRecord
from medfl.server.settings import ServerSettings, open_federation
from medfl.strategies.admission import cleaned

STUDY, COHORT = "5" * 64, "c" * 64
NOW = 1_800_000_000.0
ASKED = Instruction(kind="round", study_digest=STUDY, run="r", round=2, parts=("validation",))
REPLY = Reply(
    site="a", round=2, n_cases=10, cohort=COHORT, delta={"w": np.ones(3, dtype=np.float32)}
)


@dataclass
class Place:
    """A door, the keys of sites a and b, and a way to decide."""

    door: Door
    keys: dict[str, SigningKey]

    def decide(self, site: str, **changed: object) -> None:
        made = Decision("approved", site, STUDY, COHORT, 10, int(NOW), int(NOW) + 86400)
        decision = signed(self.keys[site], replace(made, **changed))  # type: ignore[arg-type]
        save_record(self.door.federation.state / "decisions" / STUDY / f"{site}.json", decision)

    def sealed(self, reply: Reply, asked: Instruction = ASKED, by: str = "a") -> Envelope:
        """As `medfl.client.approved` makes it, with the key of `by`."""
        envelope = pack(reply)
        bare = Seal(
            study=asked.study_digest,
            run=asked.run,
            kind=asked.kind,
            asked=asked_by(pack(asked).about),
            round=asked.round,
            attempt=asked.attempt,
            site=reply.site,
            content=content_of(envelope),
        )
        return attach(envelope, seal(self.keys[by], bare))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), NOW)
    federation = open_federation(tmp_path / "fed", lambda: NOW)
    keys = {}
    for name in ("a", "b"):
        keys[name] = new_key(tmp_path / f"{name}.key")
        record = SiteRecord(name, "active", "0" * 64, NOW + 9e6, public_of(keys[name]), int(NOW))
        save_record(federation.state / "sites" / f"{name}.json", record)
    made = Place(Door(federation, STUDY, "r", Seen(tmp_path / "seen.jsonl")), keys)
    made.decide("a")
    made.decide("b")
    return made


def test_a_sealed_and_approved_answer_counts(place: Place) -> None:
    reply = place.door.opened("a", ASKED, place.sealed(REPLY))
    assert reply.n_cases == 10
    np.testing.assert_array_equal(reply.delta["w"], REPLY.delta["w"])


def test_the_same_answer_counts_once_also_after_a_restart(place: Place) -> None:
    envelope = place.sealed(REPLY)
    place.door.opened("a", ASKED, envelope)
    again = replace(place.door, seen=Seen(place.door.seen.path))
    for door in (place.door, again):
        with pytest.raises(PolicyRefused, match="sent before"):
            door.opened("a", ASKED, envelope)


def test_an_answer_serves_only_what_was_asked(place: Place) -> None:
    envelope = place.sealed(REPLY)
    for other in (
        replace(ASKED, round=3),
        replace(ASKED, kind="finish"),
        replace(ASKED, parts=("test",)),
        replace(ASKED, attempt=1),
        replace(ASKED, seed=1),
    ):
        with pytest.raises(PolicyRefused, match="names another"):
            place.door.opened("a", other, envelope)
    with pytest.raises(PolicyRefused, match="names another run"):
        replace(place.door, run="other").opened("a", ASKED, envelope)
    with pytest.raises(PolicyRefused, match="names another study"):
        replace(place.door, study="6" * 64).opened("a", ASKED, envelope)


def test_two_questions_of_one_round_are_two_answers(place: Place) -> None:
    first = replace(ASKED, kind="finish", parts=("validation",))
    second = replace(ASKED, kind="finish", parts=("validation", "test"))
    place.door.opened("a", first, place.sealed(REPLY, first))
    place.door.opened("a", second, place.sealed(REPLY, second))


def test_nobody_answers_in_another_name(place: Place) -> None:
    with pytest.raises(PolicyRefused, match="names another site"):
        place.door.opened("b", ASKED, place.sealed(REPLY))
    forged = place.sealed(replace(REPLY, site="b"), by="a")
    with pytest.raises(PolicyRefused, match="not signed by its pinned key"):
        place.door.opened("b", ASKED, forged)


def test_an_answer_changed_on_the_way_is_refused(place: Place) -> None:
    envelope = place.sealed(REPLY)
    for altered in (
        {**envelope.arrays, "delta": {"w": np.full(3, 9, np.float32)}},
        {**envelope.arrays, "delta": {}},
    ):
        with pytest.raises(PolicyRefused, match="another content"):
            place.door.opened("a", ASKED, replace(envelope, arrays=altered))
    heavier = pack(replace(REPLY, n_cases=9)).about
    with pytest.raises(PolicyRefused, match="another content"):
        place.door.opened("a", ASKED, replace(envelope, about=heavier))


def test_only_a_refusal_may_come_unsealed(place: Place) -> None:
    with pytest.raises(PolicyRefused, match="is not signed"):
        place.door.opened("a", ASKED, pack(REPLY))
    dead = Reply(site="a", round=2, refusal="TrainerDied")
    assert place.door.opened("a", ASKED, pack(dead)).refusal == "TrainerDied"


@pytest.mark.parametrize("n_cases", [11, 10**15])
def test_a_weight_above_the_approved_cases_is_refused(place: Place, n_cases: int) -> None:
    with pytest.raises(PolicyRefused, match="more training cases than the 10 approved"):
        place.door.opened("a", ASKED, place.sealed(replace(REPLY, n_cases=n_cases)))


def test_other_cases_than_the_approved_are_refused(place: Place) -> None:
    with pytest.raises(PolicyRefused, match="other cases"):
        place.door.opened("a", ASKED, place.sealed(replace(REPLY, cohort="d" * 64)))


def test_a_private_site_names_no_cohort_and_its_declared_cases(place: Place) -> None:
    """Under differential privacy its answers leave the digest out (`hospital.answer`)."""
    declared = replace(REPLY, cohort="", n_cases=10)
    assert place.door.opened("a", ASKED, place.sealed(declared)).n_cases == 10


def test_a_site_that_withdrew_or_was_revoked_in_mid_round_does_not_count(place: Place) -> None:
    place.decide("a", verdict="withdrawn", at=int(NOW) + 1)
    with pytest.raises(PolicyRefused, match="withdrawn"):
        place.door.opened("a", ASKED, place.sealed(REPLY))
    place.decide("a")
    authority.revoke(place.door.federation, "a", "")
    with pytest.raises(PolicyRefused, match="not an active site"):
        place.door.opened("a", ASKED, place.sealed(REPLY))


def test_a_refused_answer_does_not_fill_the_slot(place: Place) -> None:
    with pytest.raises(PolicyRefused):
        place.door.opened("a", ASKED, place.sealed(replace(REPLY, n_cases=11)))
    place.door.opened("a", ASKED, place.sealed(REPLY))


def test_what_is_no_reply_is_no_answer(place: Place) -> None:
    with pytest.raises(FederationError, match="fields of a reply"):
        place.door.opened("a", ASKED, Envelope("{}", {}))


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"n_cases": 11}, "claims more cases than approved"),
        ({"cohort": "d" * 64}, "trained on other cases than approved"),
    ],
)
def test_why_an_answer_was_not_admitted_can_be_read_in_the_report(
    place: Place, change: dict[str, Any], phrase: str
) -> None:
    """Reports show no text but fixed phrases, which a reason with a number in it is not."""
    with pytest.raises(NotAdmitted) as unapproved:
        place.door.opened("a", ASKED, place.sealed(replace(REPLY, **change)))
    with pytest.raises(NotAdmitted) as unsealed:
        place.door.opened("a", ASKED, pack(REPLY))
    told = [error.value.phrase for error in (unapproved, unsealed)]
    assert told == [phrase, "its seal was not accepted"]
    shown = [cleaned(Reply(site="a", round=2, refusal=one), ()).refusal for one in told]
    assert shown == told
