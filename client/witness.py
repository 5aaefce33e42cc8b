"""The hospital's part of exchanging heads, and checking its own log and ledger against them."""

from __future__ import annotations

from pathlib import Path

from medfl.client.coordinator import Line
from medfl.client.ledger import Ledger
from medfl.client.premises import Enrolment, Home
from medfl.common import heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import FederationError, PolicyRefused
from medfl.common.heads import Checked, Witness
from medfl.common.kept import load_record, save_record


def exchange(home: Home, line: Line, ledger: Ledger) -> None:
    """Show log and ledger, keep the coordinator's signatures under them, and countersign its log.

    Raises:
        PolicyRefused: the coordinator knows a longer log or a later ledger of this site, or the
            ledger is not the one that was shown last.
        FederationError: its answer is not signed by the pinned key, or its log was rolled back.
    """
    enrolment, key = home.enrolment(), home.signing_key()
    site, them, now = enrolment.site, f"coordinator:{enrolment.federation}", home.clock()
    last = load_record(home.folder / "coordinator_head.json", Witness)
    countersigned = None
    if last is not None:
        countersigned = heads.witness(key, them, site, Head(last.n, last.hash), now)
    spent = _ledger_head(home, ledger)
    head = home.audit.head()
    own = heads.witness(key, site, site, head, now)
    shown = ShowHead(own=own, seen=countersigned, ledger=spent)
    answer = line.call("Heads", shown, HeadSeen)
    _check(answer, shown, them, enrolment)
    if last is not None and answer.own.n <= last.n:
        home.record("log of the coordinator was rolled back", had=last.n, has=answer.own.n)
        raise FederationError(
            f"The coordinator's audit log had {last.n} lines and now shows {answer.own.n}. Ask "
            "the coordinator what happened before you train on."
        )
    heads.keep(home.witnesses, answer.seen)
    save_record(home.folder / "coordinator_head.json", answer.own)
    if answer.ledger is not None:
        save_record(home.folder / "ledger_countersigned.json", answer.ledger)
    home.record("head of the coordinator", lines=answer.own.n, hash=answer.own.hash)


def check(home: Home) -> Checked:
    """Check the chain against itself and against what the coordinator has countersigned."""
    enrolment = home.enrolment()
    them = f"coordinator:{enrolment.federation}"
    found, doubtful = heads.kept(
        home.witnesses, enrolment.site, {them: enrolment.coordinator_key}.get
    )
    return heads.checked(home.audit, found, doubtful)


def refuse_other_ledger(home: Home, ledger: Ledger) -> None:
    """Nothing is trained on a ledger that lacks what it had when the coordinator was shown it.

    Raises:
        PolicyRefused: it was cut short, put back or begun anew. StorageError: it is damaged.
    """
    last = load_record(_shown_file(home), Witness)
    if last is None or ledger.has_sealed(_label(home.enrolment(), last.n), last.hash):
        return
    home.record("privacy ledger was rolled back")
    raise PolicyRefused(
        f"{ledger.folder}: the privacy ledger lacks what it had when the coordinator was last "
        "shown it: it was cut short, put back or begun anew, or site.toml names another one. "
        "Nothing is trained, since nobody knows what was spent. Restore its latest copy; where "
        "there is none, docs/privacy.md says what the data protection officer can decide."
    )


def _ledger_head(home: Home, ledger: Ledger) -> Witness | None:
    """What is shown of the ledger now; kept before it leaves, because an answer can be lost."""
    refuse_other_ledger(home, ledger)
    enrolment, last = home.enrolment(), load_record(_shown_file(home), Witness)
    n = 1 if last is None else last.n + 1
    word = ledger.sealed(_label(enrolment, n))
    if not word:
        return None
    of, key = heads.ledger_of(enrolment.site), home.signing_key()
    shown = heads.witness(key, of, enrolment.site, Head(n, word), home.clock())
    save_record(_shown_file(home), shown)
    return shown


def _shown_file(home: Home) -> Path:
    # Apart from the ledger: what puts one of the two back leaves the other.
    return home.folder / "ledger_shown.json"


def _label(enrolment: Enrolment, n: int) -> str:
    return f"{enrolment.federation}\x1f{enrolment.site}\x1f{n}"


def _check(answer: HeadSeen, shown: ShowHead, them: str, enrolment: Enrolment) -> None:
    public, own = enrolment.coordinator_key, answer.own
    pairs = [(shown.own, answer.seen), (shown.ledger, answer.ledger)]
    right = (
        own.of == own.by == them
        and heads.is_witnessed(public, own)
        and all(_countersigns(public, them, mine, theirs) for mine, theirs in pairs)
    )
    if not right:
        raise FederationError("The coordinator's signature under a head is not right.")


def _countersigns(public: str, them: str, mine: Witness | None, theirs: Witness | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    same = (theirs.of, theirs.n, theirs.hash) == (mine.of, mine.n, mine.hash)
    return same and theirs.by == them and heads.is_witnessed(public, theirs)
