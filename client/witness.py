"""The hospital's part of exchanging heads, and checking its own log and ledger against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from medfl.client.coordinator import Line
from medfl.client.ledger import Head as LedgerHead
from medfl.client.ledger import Ledger
from medfl.client.premises import Enrolment, Home
from medfl.common import heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import ConfigError, FederationError, LogRolledBack, PolicyRefused
from medfl.common.heads import Checked, Witness
from medfl.common.kept import load_record, save_record
from medfl.common.signing import public_of


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A log that had `had` lines and then `has`, or another line there. whose: of, for people."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    whose: str
    had: int
    has: int


def exchange(home: Home, line: Line, ledger: Ledger) -> None:
    """Show log and ledger, keep the coordinator's signatures under them, and countersign its log.

    Raises:
        PolicyRefused: the coordinator knows a longer log or a later ledger of this site, or the
            ledger is not the one that was shown last.
        LogRolledBack: one of the logs was put back, now or before, and nobody has accepted it.
        FederationError: the coordinator's answer is not signed by the pinned key.
    """
    _refuse(load_record(_noticed(home), RolledBack))
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
    if last is not None and not _goes_on(last, answer):
        _notice(home, RolledBack("the coordinator", last.n, answer.own.n))
    knew = answer.knew
    if knew is not None and heads.is_witnessed(public_of(key), knew):
        if home.audit.hash_at(knew.n) != knew.hash:
            _notice(home, RolledBack("this hospital", knew.n, head.n))
    heads.keep(home.witnesses, answer.seen)
    save_record(home.folder / "coordinator_head.json", answer.own)
    if answer.ledger is not None:
        save_record(home.folder / "ledger_countersigned.json", answer.ledger)
    home.record("head of the coordinator", lines=answer.own.n, hash=answer.own.hash)


def _goes_on(last: Witness, answer: HeadSeen) -> bool:
    """Whether the coordinator's log is longer than it was and still has the line shown last.

    One that was put back may have grown past that line since. What it says of the line is signed,
    and its log shows whether it is true.
    """
    then = answer.then
    same = then is not None and (then.n, then.hash) == (last.n, last.hash)
    return same and answer.own.n > last.n


def is_behind(home: Home, lines: int) -> bool:
    """Whether a coordinator's log of so many lines is shorter than the one that it has shown."""
    last = load_record(home.folder / "coordinator_head.json", Witness)
    return last is not None and lines < last.n


def accept(home: Home) -> RolledBack:
    """Go on although a log was put back.

    Raises:
        ConfigError: none was.
    """
    found = load_record(_noticed(home), RolledBack)
    if found is None:
        raise ConfigError("No log was put back, as far as is known here; there is nothing to do.")
    home.record("log that was put back accepted", whose=found.whose, had=found.had, has=found.has)
    (home.folder / "coordinator_head.json").unlink(missing_ok=True)
    _noticed(home).unlink()
    return found


def _noticed(home: Home) -> Path:
    """Stays until somebody accepts: a log that grows again would look as if nothing had been."""
    return home.folder / "rolled_back.json"


def _notice(home: Home, what: RolledBack) -> None:
    home.record("a log was put back", whose=what.whose, had=what.had, has=what.has)
    save_record(_noticed(home), what)
    _refuse(what)


def _refuse(found: RolledBack | None) -> None:
    if found is None:
        return
    raise LogRolledBack(
        f"The audit log of {found.whose} had {found.had} lines and then {found.has}, or another "
        f"line there: it was put back from a backup, or changed. Nothing goes on until somebody "
        "has asked why (telephone the coordinator) and says: medfl-client accept-log"
    )


def check(home: Home) -> Checked:
    """Check the chain against itself and against what the coordinator has countersigned."""
    enrolment = home.enrolment()
    them = f"coordinator:{enrolment.federation}"
    found, doubtful = heads.kept(
        home.witnesses, enrolment.site, {them: enrolment.coordinator_key}.get
    )
    return heads.checked(home.audit, found, doubtful)


def refuse_other_ledger(home: Home, ledger: Ledger) -> None:
    """Nothing is trained on a ledger that lacks what it had at the last answer or exchange.

    Raises:
        PolicyRefused: it was cut short, put back or begun anew. StorageError: it is damaged.
    """
    known, last = (
        load_record(_known_file(home), LedgerHead),
        load_record(_shown_file(home), Witness),
    )
    whole = known is None or ledger.noticed(known) is None
    if whole and (last is None or ledger.has_sealed(_label(home.enrolment(), last.n), last.hash)):
        return
    home.record("privacy ledger was rolled back")
    raise PolicyRefused(
        f"{ledger.folder}: the privacy ledger lacks what it had when this hospital last answered, "
        "or the coordinator was last shown it: it was cut short, put back or begun anew, or "
        "site.toml names another one. Nothing is trained, since nobody knows what was spent. "
        "Restore its latest copy; where there is none, docs/privacy.md says what the data "
        "protection officer can decide."
    )


def know_ledger(home: Home, ledger: Ledger) -> None:
    """Remember what the ledger has now: the next exchange may come after somebody put it back.

    A ledger that was put back is not taken for the new one, also where a refusal is sealed.
    """
    known, head = load_record(_known_file(home), LedgerHead), ledger.head()
    if head == known or not head.lines:
        return
    if known is None or ledger.noticed(known) is None:
        save_record(_known_file(home), head)


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


# Both apart from the ledger: what puts one of the two folders back leaves the other.
def _shown_file(home: Home) -> Path:
    return home.folder / "ledger_shown.json"


def _known_file(home: Home) -> Path:
    return home.folder / "ledger_known.json"


def _label(enrolment: Enrolment, n: int) -> str:
    return f"{enrolment.federation}\x1f{enrolment.site}\x1f{n}"


def _check(answer: HeadSeen, shown: ShowHead, them: str, enrolment: Enrolment) -> None:
    public, own = enrolment.coordinator_key, answer.own
    pairs = [(shown.own, answer.seen), (shown.ledger, answer.ledger)]
    right = all(
        one.of == one.by == them and heads.is_witnessed(public, one)
        for one in (own, *([] if answer.then is None else [answer.then]))
    ) and all(_countersigns(public, them, mine, theirs) for mine, theirs in pairs)
    if not right:
        raise FederationError("The coordinator's signature under a head is not right.")


def _countersigns(public: str, them: str, mine: Witness | None, theirs: Witness | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    same = (theirs.of, theirs.n, theirs.hash) == (mine.of, mine.n, mine.hash)
    return same and theirs.by == them and heads.is_witnessed(public, theirs)
