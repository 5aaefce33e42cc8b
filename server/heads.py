"""The coordinator's part of exchanging heads, and checking its own log against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from medfl.common import heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.heads import Checked, Witness
from medfl.common.kept import load_record, save_record
from medfl.server.federation import Federation, SiteRecord, known_name


def exchange(federation: Federation, site: SiteRecord, shown: ShowHead) -> HeadSeen:
    """Record and countersign a site's heads; keep its signature under ours.

    Raises:
        PolicyRefused: a head is not signed by the site, or the site's log or privacy ledger is
            not a later state of the one before: it was rolled back, and the audit log says so.
    """
    own, ledger = shown.own, shown.ledger
    _refuse_unsigned(site, own, site.name)
    if ledger is not None:
        _refuse_unsigned(site, ledger, heads.ledger_of(site.name))
    with federation.change():
        knew = _last(federation, site, own.of)
        _refuse_rollback(federation, own, knew)
        _refuse_rolled_ledger(federation, site, ledger)
        if shown.seen is not None:
            _keep(federation, site, shown.seen)
        about: dict[str, str | int] = {"site": site.name, "lines": own.n, "hash": own.hash}
        if ledger is not None:
            about |= {"ledger_shown": ledger.n, "ledger": ledger.hash}
        head = federation.audit.append("head of a site", about, federation.clock())
        for seen in (own, *([] if ledger is None else [ledger])):
            save_record(_file(federation, seen.of), seen)
    key, now = federation.signing_key(), federation.clock()

    def countersigned(seen: Witness) -> Witness:
        return heads.witness(key, seen.of, federation.title, Head(seen.n, seen.hash), now)

    then = None
    if shown.seen is not None:
        line = Head(shown.seen.n, federation.audit.hash_at(shown.seen.n))
        then = heads.witness(key, federation.title, federation.title, line, now)
    return HeadSeen(
        own=heads.witness(key, federation.title, federation.title, head, now),
        seen=countersigned(own),
        ledger=None if ledger is None else countersigned(ledger),
        then=then,
        knew=knew,
    )


def check(federation: Federation) -> Checked:
    """Check the chain against itself and against what the sites have countersigned."""

    def key_of(site: str) -> str | None:
        record = federation.site(site)
        return None if record is None else record.signing_key

    found, doubtful = heads.kept(federation.witnesses, federation.title, key_of)
    return heads.checked(federation.audit, found, doubtful)


def accept(federation: Federation, site: str) -> int:
    """Let a site's log be shorter than it was, once; how long it was.

    Raises:
        ConfigError: no head of such a site is known.
    """
    with federation.change():
        last = load_record(_file(federation, known_name(site)), Witness)
        if last is None:
            raise ConfigError(f"{site}: no head of its log is known here; there is nothing to do")
        federation.record("shorter log of a site accepted", site=site, had=last.n, hash=last.hash)
        _file(federation, site).unlink()
        _file(federation, heads.ledger_of(site)).unlink(missing_ok=True)
        _noticed(federation, site).unlink(missing_ok=True)
        return last.n


def _refuse_unsigned(site: SiteRecord, shown: Witness, of: str) -> None:
    if shown.of != of or shown.by != site.name:
        raise PolicyRefused("The head is another site's.")
    if not heads.is_witnessed(site.signing_key, shown):
        raise PolicyRefused("The head is not signed by the key pinned for this site.")


def _refuse_rollback(federation: Federation, own: Witness, last: Witness | None) -> None:
    noticed = _noticed(federation, own.of)
    if last is None:
        noticed.unlink(missing_ok=True)
        return
    grown = own.n > last.n or (own.n == last.n and own.hash == last.hash)
    if grown and not noticed.exists():
        return
    if not noticed.exists():
        federation.record("log of a site was rolled back", site=own.of, had=last.n, has=own.n)
        # A log that is cut and grows again is still another one.
        noticed.touch(mode=0o600)
    raise PolicyRefused(
        f"The audit log of {own.of} had {last.n} lines and then fewer, or another line there. "
        "Restore a newer backup; if there is none, telephone the coordinator, who can say: "
        f"medfl-server accept-log {own.of}"
    )


def _noticed(federation: Federation, site: str) -> Path:
    return federation.state / "heads" / f"{site}.rolled-back"


def _refuse_rolled_ledger(federation: Federation, site: SiteRecord, shown: Witness | None) -> None:
    """No number is shown twice: a site counts an exchange before it begins."""
    last = _last(federation, site, heads.ledger_of(site.name))
    if last is None or (shown is not None and shown.n > last.n):
        return
    has = 0 if shown is None else shown.n - 1
    federation.record("ledger of a site was rolled back", site=site.name, had=last.n, has=has)
    raise PolicyRefused(
        f"The privacy ledger of {site.name} was shown here {last.n} times, and its folders "
        f"remember {has}: they were put back or begun anew, and what was spent since is lost. "
        "Restore the latest copy of the ledger and of the state folder, or telephone "
        f"the coordinator, who can say: medfl-server accept-log {site.name}"
    )


def _keep(federation: Federation, site: SiteRecord, seen: Witness) -> None:
    genuine = seen.of == federation.title and seen.by == site.name
    if not genuine or not heads.is_witnessed(site.signing_key, seen):
        raise PolicyRefused("The countersignature is not this site's, or not under our log.")
    lost = load_record(_restored(federation), Restored)
    if lost is not None and seen.n > lost.lines:
        if federation.audit.hash_at(seen.n) != seen.hash:
            # Of the log as it went on after the backup: shown once, and no fault of today's log.
            federation.record("line lost in a restore", site=site.name, line=seen.n, hash=seen.hash)
            heads.keep(federation.folder / "witnesses-lost.jsonl", seen)
            return
    heads.keep(federation.witnesses, seen)


@dataclass(frozen=True, slots=True)
class Restored:
    """The coordinator's log was put back with so many lines; what sites saw after them is lost."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    lines: int


def note_restore(federation: Federation, lines: int, made: str) -> None:
    """Say in the log that it was put back. made: when the backup was."""
    federation.record("restored from a backup", made=made, lines=lines)
    save_record(_restored(federation), Restored(lines))


def _restored(federation: Federation) -> Path:
    return federation.state / "restored.json"


def _last(federation: Federation, site: SiteRecord, of: str) -> Witness | None:
    """The last head of a log or ledger; None before the first, and after enrolling again."""
    last = load_record(_file(federation, of), Witness)
    # Enrolling again pins another key, and `medfl-server invite --again` was a person's word.
    return last if last is not None and heads.is_witnessed(site.signing_key, last) else None


def _file(federation: Federation, of: str) -> Path:
    kind, _, site = of.rpartition(":")
    return federation.state / "heads" / f"{site}{'.' + kind if kind else ''}.json"
