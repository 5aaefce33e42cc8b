"""The coordinator's part of exchanging audit heads, and checking its own log against them."""

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
    """Record and countersign a site's head; keep its signature under ours.

    Raises:
        PolicyRefused: the head is not signed by the site, or its log is shorter or another than
            before: the site's log was rolled back, and the audit log says so.
    """
    own = shown.own
    if own.of != site.name or own.by != site.name:
        raise PolicyRefused("The audit head is another site's.")
    if not heads.is_witnessed(site.signing_key, own):
        raise PolicyRefused("The audit head is not signed by the key pinned for this site.")
    with federation.change():
        knew = _last(federation, site)
        _refuse_rollback(federation, own, knew)
        if shown.seen is not None:
            _keep(federation, site, shown.seen)
        head = federation.audit.append(
            "head of a site",
            {"site": site.name, "lines": own.n, "hash": own.hash},
            federation.clock(),
        )
        save_record(_file(federation, site.name), own)
    key, now = federation.signing_key(), federation.clock()
    return HeadSeen(
        own=heads.witness(key, federation.title, federation.title, head, now),
        seen=heads.witness(key, site.name, federation.title, Head(own.n, own.hash), now),
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
        _noticed(federation, site).unlink(missing_ok=True)
        return last.n


def _last(federation: Federation, site: SiteRecord) -> Witness | None:
    """The head that the site showed last; not one of an earlier enrolment under its name."""
    last = load_record(_file(federation, site.name), Witness)
    return last if last is not None and heads.is_witnessed(site.signing_key, last) else None


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


def _file(federation: Federation, site: str) -> Path:
    return federation.state / "heads" / f"{site}.json"
