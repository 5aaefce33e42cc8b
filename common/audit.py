"""The audit log: JSON lines, each holding the SHA-256 of the one before it.

    audit.jsonl               the end of the chain; lines are added here
    audit-<first line>.jsonl  what came before: a file that has grown to its limit is put aside
                              whole, and the next goes on with its numbers and its last hash

An edited, removed or added line breaks the chain at that line. What a chain alone cannot show is
that its end was cut off or its last line rewritten: for that, each side countersigns the other's
head (`medfl.common.heads`), and `verify` is given those heads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from medfl.common.errors import StorageError
from medfl.common.signing import canonical

log = logging.getLogger(__name__)

START = "0" * 64
# A line is a fact with a few numbers; the tail of the file always holds a whole one.
MAX_LINE = 16 * 1024
# A file that is larger than this is put aside before the next line.
MAX_FILE = 16 * 1024 * 1024
_KEYS = {"n", "at", "what", "about", "before", "hash"}


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain: so many lines, and the hash of the last (START for none)."""

    n: int
    hash: str


@dataclass(frozen=True, slots=True)
class BadLine:
    """The first line that is not as it was written."""

    n: int
    why: str


@dataclass(frozen=True, slots=True)
class AuditLog:
    """One log; any number of processes of this machine may append to it. max_file: bytes."""

    path: Path
    max_file: int = MAX_FILE

    def append(self, what: str, about: Mapping[str, Any], at: float | None = None) -> Head:
        """Add one line and wait until the disk has it.

        about: plain JSON values; counts and names of sites, never of patients or their files.

        Raises:
            StorageError: the disk refused, or the log's last line is damaged.
        """
        try:
            while True:
                with self._open() as file:
                    if not self._is_the_end(file):
                        continue  # another process has put this file aside meanwhile
                    torn = _cut_torn_line(self.path, file)
                    head = _last(self.path, file)
                    if torn:
                        head = _write(file, head, "recovered", {"bytes": torn}, time.time())
                    if os.fstat(file.fileno()).st_size > self.max_file:
                        self._put_aside(file)
                        continue
                    return _write(file, head, what, about, time.time() if at is None else at)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error.strerror}). Free some space; nothing is "
                "done that cannot be recorded"
            ) from None

    def head(self) -> Head:
        """The last line's number and hash. Raises StorageError."""
        if not files_of(self.path):
            return Head(0, START)
        try:
            while True:
                with self._open() as file:
                    if not self._is_the_end(file):
                        continue
                    torn = _cut_torn_line(self.path, file)
                    head = _last(self.path, file)
                    return _write(file, head, "recovered", {"bytes": torn}) if torn else head
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None

    @contextmanager
    def held(self) -> Iterator[list[Path]]:
        """Its files, first line to last; meanwhile nothing is added and no file is put aside.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            while files_of(self.path):
                with self._open() as file:
                    if self._is_the_end(file):
                        yield files_of(self.path)
                        return
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None
        yield []

    def has(self, file: Path) -> bool:
        """Whether this is one of its files, as they are named."""
        aside = re.fullmatch(rf"{re.escape(self.path.stem)}-\d{{12}}\.jsonl", file.name)
        return file.parent == self.path.parent and (file == self.path or aside is not None)

    def hash_at(self, n: int) -> str:
        """The hash that line `n` says it has; "" where there is no such line."""
        if n < 1:
            return ""
        raw = next(islice(_raw_lines(self.path), n - 1, n), b"")
        plain = _parsed(raw.removesuffix(b"\n"))
        return "" if plain is None else str(plain["hash"])

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines as they are, without checking the chain; damaged ones are left out."""
        for raw in _raw_lines(self.path):
            plain = _parsed(raw.removesuffix(b"\n"))
            if plain is not None:
                yield plain

    def _is_the_end(self, file: BinaryIO) -> bool:
        """Take the lock; whether the open file is still the one that lines are added to."""
        fcntl.flock(file, fcntl.LOCK_EX)
        mine = os.fstat(file.fileno())
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _put_aside(self, file: BinaryIO) -> None:
        """Under the lock. A crash in between leaves whole files, and the next line a new one."""
        file.seek(0)
        first = json.loads(file.readline())["n"]
        os.rename(self.path, self.path.with_name(f"{self.path.stem}-{first:012d}.jsonl"))

    def _open(self) -> BinaryIO:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return os.fdopen(handle, "r+b")


def files_of(path: Path) -> list[Path]:
    """The files of a log that are there, from its first line to its last."""
    aside = sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 12}.jsonl"))
    return [*aside, *([path] if path.exists() else [])]


def _raw_lines(path: Path) -> Iterator[bytes]:
    for each in files_of(path):
        with each.open("rb") as file:
            yield from file


def verify(path: Path, heads: Mapping[int, str] | None = None) -> BadLine | None:
    """The first bad line, or None where all is as written.

    heads: line number -> hash, as the other side has countersigned them.
    """
    wanted = dict(heads or {})
    before, n = START, 0
    for n, raw in enumerate(_raw_lines(path), start=1):
        bad = _fault(raw, n, before)
        if bad is not None:
            return bad
        before = json.loads(raw)["hash"]
        if wanted.pop(n, before) != before:
            return BadLine(n, "is not the line that the other side countersigned")
    if wanted:
        return BadLine(n + 1, f"is missing: the other side countersigned {max(wanted)} lines")
    return None


def _fault(raw: bytes, n: int, before: str) -> BadLine | None:
    if not raw.endswith(b"\n"):
        return BadLine(n, "is torn: its end is missing")
    plain = _parsed(raw[:-1])
    if plain is None:
        return BadLine(n, "is not a line of this log")
    if plain["n"] != n:
        return BadLine(n, f"says that it is line {plain['n']}: lines were removed or added")
    if plain["hash"] != _hash(plain):
        return BadLine(n, "was changed: its content does not have its hash")
    if plain["before"] != before:
        # This line is whole and says what the one before was: that one was rewritten.
        return BadLine(max(1, n - 1), "was rewritten: the next line holds another hash of it")
    return None


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line's fields, or None where it is not exactly what `_write` writes."""
    try:
        plain = json.loads(raw)
        if isinstance(plain, dict) and set(plain) == _KEYS and canonical(plain) == raw:
            return plain
    except (ValueError, RecursionError):
        return None
    return None


def _hash(plain: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in plain.items() if key != "hash"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def _write(
    file: BinaryIO, head: Head, what: str, about: Mapping[str, Any], at: float | None = None
) -> Head:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    plain: dict[str, Any] = {
        "n": head.n + 1,
        "at": when,
        "what": what,
        "about": dict(about),
        "before": head.hash,
    }
    plain["hash"] = _hash(plain)
    line = canonical(plain) + b"\n"
    if len(line) > MAX_LINE:
        raise StorageError(f"An audit line of {len(line)} bytes is too long; record counts only.")
    file.seek(0, os.SEEK_END)
    # One write: what a crash leaves is a prefix of this line, which the next writer cuts off.
    if os.write(file.fileno(), line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file.fileno())
    return Head(head.n + 1, plain["hash"])


def _tail(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2 * MAX_LINE))
    return file.read(2 * MAX_LINE)


def _last(path: Path, file: BinaryIO) -> Head:
    tail = _tail(file)
    if not tail:
        aside = [each for each in files_of(path) if each != path]
        if not aside:
            return Head(0, START)
        with aside[-1].open("rb") as before:
            tail = _tail(before)
    plain = _parsed(tail[:-1].rpartition(b"\n")[2])
    if plain is None or plain["hash"] != _hash(plain):
        raise StorageError(
            f"{path}: the last line is damaged, so nothing can be added. `audit verify` names the "
            "first bad line; restore the log from the backup"
        )
    return Head(plain["n"], plain["hash"])


def _cut_torn_line(path: Path, file: BinaryIO) -> int:
    """Cut an unfinished last line off, keeping it beside the log; returns its bytes."""
    tail = _tail(file)
    if not tail or tail.endswith(b"\n"):
        return 0
    torn = tail.rpartition(b"\n")[2]
    size = file.seek(0, os.SEEK_END)
    with path.with_name(f"{path.name}.torn").open("ab") as kept:
        kept.write(torn + b"\n")
        os.fsync(kept.fileno())
    os.ftruncate(file.fileno(), size - len(torn))
    os.fsync(file.fileno())
    log.warning("the audit log's last line was unfinished; %d bytes were set aside", len(torn))
    return len(torn)
