"""The coordinator's part of exchanging heads, and checking its own log against them."""

from __future__ import annotations

from pathlib import Path

from medfl.common import heads
from medfl.common.audit import Head
from medfl.common.coordination import HeadSeen, ShowHead
from medfl.common.errors import PolicyRefused
from medfl.common.heads import Checked, Witness
from medfl.common.kept import load_record, save_record
from medfl.server.federation import Federation, SiteRecord


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
        _refuse_rollback(federation, site, own)
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

    return HeadSeen(
        own=heads.witness(key, federation.title, federation.title, head, now),
        seen=countersigned(own),
        ledger=None if ledger is None else countersigned(ledger),
    )


def check(federation: Federation) -> Checked:
    """Check the chain against itself and against what the sites have countersigned."""

    def key_of(site: str) -> str | None:
        record = federation.site(site)
        return None if record is None else record.signing_key

    found, doubtful = heads.kept(federation.witnesses, federation.title, key_of)
    return heads.checked(federation.audit, found, doubtful)


def _refuse_unsigned(site: SiteRecord, shown: Witness, of: str) -> None:
    if shown.of != of or shown.by != site.name:
        raise PolicyRefused("The head is another site's.")
    if not heads.is_witnessed(site.signing_key, shown):
        raise PolicyRefused("The head is not signed by the key pinned for this site.")


def _refuse_rollback(federation: Federation, site: SiteRecord, own: Witness) -> None:
    last = _last(federation, site, own.of)
    if last is None or own.n > last.n or (own.n == last.n and own.hash == last.hash):
        return
    federation.record("log of a site was rolled back", site=site.name, had=last.n, has=own.n)
    raise PolicyRefused(
        f"The audit log of {own.of} had {last.n} lines and now shows {own.n}, or another line "
        f"{own.n}. Restore it from the backup, or enrol again and say why."
    )


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
        "Restore the latest copy of the ledger and of the state folder, or enrol again and say why."
    )


def _keep(federation: Federation, site: SiteRecord, seen: Witness) -> None:
    genuine = seen.of == federation.title and seen.by == site.name
    if not genuine or not heads.is_witnessed(site.signing_key, seen):
        raise PolicyRefused("The countersignature is not this site's, or not under our log.")
    heads.keep(federation.witnesses, seen)


def _last(federation: Federation, site: SiteRecord, of: str) -> Witness | None:
    """The last head of a log or ledger; None before the first, and after enrolling again."""
    last = load_record(_file(federation, of), Witness)
    # Enrolling again pins another key, and `medfl-server invite --again` was a person's word.
    return last if last is not None and heads.is_witnessed(site.signing_key, last) else None


def _file(federation: Federation, of: str) -> Path:
    kind, _, site = of.rpartition(":")
    return federation.state / "heads" / f"{site}{'.' + kind if kind else ''}.json"
