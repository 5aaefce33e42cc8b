"""Backup and restore of a hospital's state, while the client runs or not.

Kept: keys, pins, studies, approvals, the log; the privacy ledger; the key of the pseudonyms and the
list of withdrawn patients, which lie where site.toml says. Not kept: images, and the cache, which
is made from them.

A ledger that is put back may say less than was spent. That is noticed, never passed over: the log
goes with it, and the coordinator knows how long the log was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medfl.client import witness
from medfl.client.data.lineage import lineage_path
from medfl.client.data.withdrawn import list_path
from medfl.client.deid.keys import secret_path
from medfl.client.ledger import Head, Ledger
from medfl.client.premises import Home
from medfl.common import backup
from medfl.common.backup import Item, Manifest, below
from medfl.common.errors import StorageError
from medfl.common.site import Site, load_site

KIND = "medfl-client"
_REMADE = frozenset({"node", "trainer.log", "status.json"})
_WITNESSES = "witnesses.jsonl"
_LEDGER_FIRST = "ledger.jsonl"


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back. kept: places that held something already, which was left as it is."""

    manifest: Manifest
    lines: int
    kept: tuple[Path, ...]


def save(home: Home, site_file: Path, out: Path) -> Manifest:
    """Write a backup. Raises StorageError, ConfigError."""
    known, site = home.enrolment(), load_site(site_file)
    head = Ledger(site.ledger).head()
    about = {"site": known.site, "ledger_lines": str(head.lines), "ledger_hash": head.hash}
    made = backup.save(out, KIND, _items(home, site, site_file), about)
    home.record("backed up", files=len(made.files))
    return made


def _items(home: Home, site: Site, site_file: Path) -> Iterator[Item]:
    yield from (
        item
        for item in below(home.folder, "state", _REMADE | frozenset({_WITNESSES}))
        if not home.audit.has(item[1])
    )
    # What a round did stands in the log before its answer goes, and in the ledger before it trains:
    # later copies of both hold all that earlier ones point to.
    if home.witnesses.exists():
        yield f"state/{_WITNESSES}", home.witnesses
    # A file that is put aside while the others are copied would be missing from the chain.
    with home.audit.held() as files:
        yield from ((f"state/{file.name}", file) for file in files)
    # A line of the ledger points to its patients.
    if (site.ledger / _LEDGER_FIRST).exists():
        yield f"ledger/{_LEDGER_FIRST}", site.ledger / _LEDGER_FIRST
    yield from below(site.ledger, "ledger", frozenset({_LEDGER_FIRST}))
    for name, path in _beside(site, site_file):
        if path.exists():
            yield name, path


def _beside(site: Site, site_file: Path) -> list[Item]:
    """Single files whose place site.toml says."""
    return [
        ("beside/site.toml", site_file),
        ("beside/secret", secret_path(site)),
        ("beside/withdrawn", list_path(site)),
        ("beside/lineage", lineage_path(site)),
    ]


def restore(path: Path, state: Path, site_file: Path) -> Restored:
    """Put a backup back where this hospital's site.toml says; what is there already stays.

    Only the state folder must be new: a ledger or key that has survived is newer than the backup.

    Raises:
        ConfigError: the state folder holds something.
        StorageError: the backup is damaged, or a ledger is there that lacks what the backup has.
    """
    found = backup.opened(path, KIND)
    backup.refuse_full(state)
    found.put_file("beside/site.toml", site_file)
    site = load_site(site_file)
    kept = _restore_ledger(found, site)
    for name, place in _beside(site, site_file):
        if place.exists() and found.text(name) not in (None, place.read_bytes()):
            kept.append(place)
        found.put_file(name, place)
    found.put_back("state", state)
    home = Home(state)
    checked = witness.check(home)
    if checked.bad is not None:
        raise StorageError(f"{path}: its audit.jsonl: line {checked.bad.n} {checked.bad.why}")
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.manifest.at))
    home.record("restored from a backup", made=made, lines=checked.lines)
    return Restored(found.manifest, checked.lines, tuple(kept))


def _restore_ledger(found: backup.Backup, site: Site) -> list[Path]:
    folder, about = site.ledger, found.manifest.about
    if not folder.exists() or not any(folder.iterdir()):
        found.put_back("ledger", folder)
        Ledger(folder).head()  # reads and checks the whole chain
        return []
    had = Head(int(about["ledger_lines"]), about["ledger_hash"])
    if wrong := Ledger(folder).noticed(had):
        raise StorageError(f"{folder}: {wrong}")
    return [folder]
