"""Countersigned ends of the audit logs: each side keeps the other's signature under its own head.

A chain shows that nothing inside it was changed; that its end was not cut off shows only somebody
else's word of how long it was. `Witness` is that word.

A hospital's privacy ledger is witnessed in the same way, but its length and its hashes would tell
what the hospital does elsewhere. So its witness counts how often it was shown, and holds a word
that is new each time (`medfl.client.ledger.Ledger.sealed`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, ValidationError

from medfl.common.audit import AuditLog, BadLine, Head, verify
from medfl.common.config import decoded
from medfl.common.errors import StorageError
from medfl.common.signing import SigningKey, canonical, is_signed, sign

log = logging.getLogger(__name__)

_PURPOSE = "audit head"


@dataclass(frozen=True, slots=True)
class Witness:
    """`by` has seen that the log of `of` had `n` lines, the last with this hash, at `at`.

    of, by: a site's name, or "coordinator:" and the federation's name. at: seconds since 1970.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    of: str
    by: str
    n: int
    hash: str
    at: int
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """bad: the first bad line or None. heads: so many are countersigned. doubtful: not believed."""

    bad: BadLine | None
    lines: int
    heads: int
    doubtful: int


def ledger_of(site: str) -> str:
    """What a site's privacy ledger is called in a witness; no site's name has a colon."""
    return f"ledger:{site}"


def checked(log: AuditLog, known: Mapping[int, str], doubtful: int) -> Checked:
    """The chain against itself and the heads `known` from `kept`."""
    lines = sum(1 for _ in log.lines())
    return Checked(verify(log.path, known), lines, len(known), doubtful)


def witness(key: SigningKey, of: str, by: str, head: Head, at: float) -> Witness:
    """Sign a head: one's own (of = by) to announce it, another's to countersign it."""
    bare = Witness(of=of, by=by, n=head.n, hash=head.hash, at=int(at))
    return Witness(**{**asdict(bare), "signature": sign(key, _PURPOSE, _signed_part(bare))})


def is_witnessed(public: str, seen: Witness) -> bool:
    """Whether the signature is that of `public` (hex)."""
    return is_signed(public, _PURPOSE, _signed_part(seen), seen.signature)


def keep(path: Path, seen: Witness) -> None:
    """Append to the file of witnesses and wait for the disk. Raises StorageError."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(canonical(asdict(seen)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def kept(path: Path, of: str, key_of: Callable[[str], str | None]) -> tuple[dict[int, str], int]:
    """(line number -> hash) that others have signed for the log of `of`, and lines not believed.

    key_of: the pinned public key of a name, None where there is none.
    """
    heads: dict[int, str] = {}
    doubtful = 0
    if not path.exists():
        return heads, doubtful
    for raw in path.read_bytes().splitlines():
        try:
            seen = decoded(raw, Witness)
        except ValidationError:
            doubtful += 1
            continue
        public = key_of(seen.by)
        if seen.of == of and public is not None and is_witnessed(public, seen):
            heads[seen.n] = seen.hash
        else:
            doubtful += 1
    if doubtful:
        log.warning("%d countersignatures could not be checked", doubtful)
    return heads, doubtful


def _signed_part(seen: Witness) -> dict[str, object]:
    return {key: value for key, value in asdict(seen).items() if key != "signature"}
