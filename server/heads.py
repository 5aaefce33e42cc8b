"""The coordinator's part of exchanging audit heads, and checking its own log against them."""

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
        _refuse_rollback(federation, own)
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
    )


def check(federation: Federation) -> Checked:
    """Check the chain against itself and against what the sites have countersigned."""

    def key_of(site: str) -> str | None:
        record = federation.site(site)
        return None if record is None else record.signing_key

    found, doubtful = heads.kept(federation.witnesses, federation.title, key_of)
    return heads.checked(federation.audit, found, doubtful)


def _refuse_rollback(federation: Federation, own: Witness) -> None:
    last = load_record(_file(federation, own.of), Witness)
    if last is None or own.n > last.n or (own.n == last.n and own.hash == last.hash):
        return
    federation.record("log of a site was rolled back", site=own.of, had=last.n, has=own.n)
    raise PolicyRefused(
        f"The audit log of {own.of} had {last.n} lines and now shows {own.n}, or another line "
        f"{own.n}. Restore it from the backup, or enrol again and say why."
    )


def _keep(federation: Federation, site: SiteRecord, seen: Witness) -> None:
    genuine = seen.of == federation.title and seen.by == site.name
    if not genuine or not heads.is_witnessed(site.signing_key, seen):
        raise PolicyRefused("The countersignature is not this site's, or not under our log.")
    heads.keep(federation.witnesses, seen)


def _file(federation: Federation, site: str) -> Path:
    return federation.state / "heads" / f"{site}.json"
