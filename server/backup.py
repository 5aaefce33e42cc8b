"""Backup and restore of the coordinator's folder, while the server runs or not.

Kept: settings, keys, sites, invitations, studies, decisions, runs with their models, the log.
Not kept: what the engine makes anew (its database and log). A run that was under way is taken up
from its last checkpoint, as after any other end of the server.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from medfl.common import backup
from medfl.common.backup import Backup, Item, Manifest, below
from medfl.common.errors import StorageError
from medfl.common.private_files import write_private
from medfl.server import authority, heads
from medfl.server.federation import Federation
from medfl.server.runs import UNCONFIRMED
from medfl.server.settings import open_federation

KIND = "medfl-server"
# The SuperLink's database holds messages of rounds that nobody waits for any more.
_REMADE = frozenset({"engine/superlink.db", "engine/superlink.log", "engine/flwr"})
_WITNESSES = "witnesses.jsonl"


def save(federation: Federation, out: Path) -> Manifest:
    """Write a backup. Raises StorageError, ConfigError."""
    with federation.change():
        head = federation.audit.head()
        about = {"name": federation.name, "audit_lines_at_least": str(head.n)}
        made = backup.save(out, KIND, _items(federation), about)
    federation.record("backed up", files=len(made.files))
    return made


def _items(federation: Federation) -> Iterator[Item]:
    """Nothing is done that the log does not hold: so the log comes last."""
    folder = federation.folder
    leave = _REMADE | {_WITNESSES}
    database = frozenset(p.name for p in (folder / "engine").glob("superlink.db*"))
    leave |= {f"engine/{name}" for name in database}
    yield from (i for i in below(folder, "fed", leave) if not federation.audit.has(i[1]))
    if (folder / _WITNESSES).exists():
        yield f"fed/{_WITNESSES}", folder / _WITNESSES
    # A file that is put aside while the others are copied would be missing from the chain.
    with federation.audit.held() as files:
        yield from ((f"fed/{file.name}", file) for file in files)


def restore(path: Path, folder: Path) -> tuple[Backup, Federation]:
    """Make the folder anew from a backup, and note it in the log.

    Raises:
        ConfigError: the folder holds something. StorageError: the backup is damaged, or its log.
    """
    found = backup.opened(path, KIND)
    found.put_back("fed", folder)
    federation = open_federation(folder)
    checked = heads.check(federation)
    if checked.bad is not None:
        raise StorageError(f"{path}: its audit.jsonl: line {checked.bad.n} {checked.bad.why}")
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.manifest.at))
    heads.note_restore(federation, checked.lines, made)
    authority.cancel_open(federation)
    write_private(_unconfirmed(federation), f"{made}\n".encode())
    return found, federation


def unconfirmed(federation: Federation) -> list[str]:
    """What is to be said of a state that was put back, until a person has confirmed it."""
    try:
        made = _unconfirmed(federation).read_text().strip()
    except OSError:
        return []
    return [
        f"This state was put back from a backup of {made}: revocations and used tokens since then "
        "are not in it, and no run starts. Compare `medfl-server sites` with your notes, revoke "
        "again who was, then: medfl-server confirm-restore"
    ]


def confirm(federation: Federation) -> bool:
    """A person has compared sites and revocations; False where nothing was to be confirmed."""
    if not unconfirmed(federation):
        return False
    federation.record("restore confirmed")
    _unconfirmed(federation).unlink()
    return True


def _unconfirmed(federation: Federation) -> Path:
    return federation.state / UNCONFIRMED
