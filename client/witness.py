"""The hospital's part of exchanging audit heads, and checking its own log against them."""

from __future__ import annotations

from medfl.client.coordinator import Line
from medfl.client.premises import Home
from medfl.common import heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import FederationError
from medfl.common.heads import Checked, Witness
from medfl.common.kept import load_record, save_record


def exchange(home: Home, line: Line) -> None:
    """Show the log's head, keep the coordinator's signature under it, and countersign its own.

    Raises:
        PolicyRefused: the coordinator knows a longer log of this site.
        FederationError: its answer is not signed by the pinned key, or its log was rolled back.
    """
    enrolment, key = home.enrolment(), home.signing_key()
    site, them, now = enrolment.site, f"coordinator:{enrolment.federation}", home.clock()
    last = load_record(home.folder / "coordinator_head.json", Witness)
    countersigned = None
    if last is not None:
        countersigned = heads.witness(key, them, site, Head(last.n, last.hash), now)
    head = home.audit.head()
    shown = ShowHead(own=heads.witness(key, site, site, head, now), seen=countersigned)
    answer = line.call("Heads", shown, HeadSeen)
    _check(answer, site, them, head, enrolment.coordinator_key)
    if last is not None and answer.own.n <= last.n:
        home.record("log of the coordinator was rolled back", had=last.n, has=answer.own.n)
        raise FederationError(
            f"The coordinator's audit log had {last.n} lines and now shows {answer.own.n}. Ask "
            "the coordinator what happened before you train on."
        )
    heads.keep(home.witnesses, answer.seen)
    save_record(home.folder / "coordinator_head.json", answer.own)
    home.record("head of the coordinator", lines=answer.own.n, hash=answer.own.hash)


def check(home: Home) -> Checked:
    """Check the chain against itself and against what the coordinator has countersigned."""
    enrolment = home.enrolment()
    them = f"coordinator:{enrolment.federation}"
    found, doubtful = heads.kept(
        home.witnesses, enrolment.site, {them: enrolment.coordinator_key}.get
    )
    return heads.checked(home.audit, found, doubtful)


def _check(answer: HeadSeen, site: str, them: str, head: Head, public: str) -> None:
    own, seen = answer.own, answer.seen
    right = (
        own.of == own.by == seen.by == them
        and (seen.of, seen.n, seen.hash) == (site, head.n, head.hash)
        and heads.is_witnessed(public, own)
        and heads.is_witnessed(public, seen)
    )
    if not right:
        raise FederationError("The coordinator's signature under the audit head is not right.")
