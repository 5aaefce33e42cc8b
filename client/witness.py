"""The hospital's part of exchanging audit heads, and checking its own log against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from medfl.client.coordinator import Line
from medfl.client.premises import Home
from medfl.common import heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import ConfigError, FederationError, LogRolledBack
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


def exchange(home: Home, line: Line) -> None:
    """Show the log's head, keep the coordinator's signature under it, and countersign its own.

    Raises:
        PolicyRefused: the coordinator knows a longer log of this site.
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
    head = home.audit.head()
    shown = ShowHead(own=heads.witness(key, site, site, head, now), seen=countersigned)
    answer = line.call("Heads", shown, HeadSeen)
    _check(answer, site, them, head, enrolment.coordinator_key)
    if last is not None and answer.own.n <= last.n:
        _notice(home, RolledBack("the coordinator", last.n, answer.own.n))
    knew = answer.knew
    if knew is not None and heads.is_witnessed(public_of(key), knew):
        if home.audit.hash_at(knew.n) != knew.hash:
            _notice(home, RolledBack("this hospital", knew.n, head.n))
    heads.keep(home.witnesses, answer.seen)
    save_record(home.folder / "coordinator_head.json", answer.own)
    home.record("head of the coordinator", lines=answer.own.n, hash=answer.own.hash)


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
