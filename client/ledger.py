"""What a hospital has spent of its patients' privacy, ever: a file that only grows.

Every use is written and flushed to the disk *before* the data are touched (reserve), and marked
when it is done (settle). Settling gives nothing back: what was reserved counts as spent, so a
process that is killed at any moment leaves a ledger that says too much, never too little.

Each line holds the hash of the line before it. A line that was edited, removed or put in between
breaks the chain here; a ledger that was cut short, put back from a backup or begun anew does not,
and is noticed by whoever keeps a later `Head` (a colleague, a sheet of paper) or what was `sealed`
later (the coordinator, `medfl.client.witness`).

ledger.jsonl          {"number", "kind": open | reserve | settle, ..., "previous", "hash"} a line
patients-<digest>.u64 sorted keyed hashes (HMAC-SHA256, first 8 bytes) of the patients of a cohort
key                   of those hashes; without it nobody can say who is in two cohorts
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from medfl.client.composition import Charge, Ids, Step, heaviest, per_patient
from medfl.common import tensors
from medfl.common.errors import StorageError

log = logging.getLogger(__name__)

Line = dict[str, Any]
# (uses of before that weigh on these patients, this use) -> nothing, or BudgetSpent.
Check = Callable[[list[list[Step]], Step, tuple["Entry", ...]], None]


@dataclass(frozen=True, slots=True)
class Head:
    """How far a ledger has come: its number of lines and the last one's hash. Safe to hand out."""

    lines: int
    hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One reserved use. cohort: digest of its patients. most_records: of any one of them."""

    number: int
    charge: Charge
    cohort: str
    most_records: int
    when: str
    settled: bool = False

    @property
    def step(self) -> Step:
        """What it costs a patient."""
        return per_patient(self.charge, self.most_records)


@dataclass(frozen=True)
class Ledger:
    """The ledger in one folder; made when first used. Processes take turns by a lock file."""

    folder: Path

    def reserve(self, charge: Charge, patients: Sequence[str], check: Check | None = None) -> Entry:
        """Write down one use, durably, if `check` does not object; call before touching data.

        patients: the patient of each record, as keyed hashes.

        Raises:
            BudgetSpent: `check` objects; nothing was written.
            StorageError: the ledger is damaged or cannot be written.
        """
        if not patients:
            raise ValueError("a use of no patients need not be reserved")
        with self._locked():
            lines = self._lines(make=True)
            ids, most = self._ids(patients)
            before = _entries(lines)
            entry = Entry(len(lines), charge, _digest(ids), most, _now())
            if check is not None:
                check(self._heaviest(before, ids), entry.step, before)
            self._keep(ids, entry.cohort)
            plain = {"charge": asdict(charge), "cohort": entry.cohort, "most_records": most}
            self._append(lines, {"kind": "reserve", "when": entry.when, **plain})
        return entry

    def settle(self, entry: Entry) -> None:
        """Mark a use as done. What it cost stays the same. Raises StorageError."""
        with self._locked():
            lines = self._lines(make=False)
            found = {e.number: e for e in _entries(lines)}.get(entry.number)
            if found is None or found.charge != entry.charge:
                raise StorageError(
                    f"{self.folder}: the ledger no longer has the use that was reserved. Stop, and "
                    "find out who changed it."
                )
            if not found.settled:
                self._append(lines, {"kind": "settle", "when": _now(), "entry": entry.number})

    def entries(self) -> tuple[Entry, ...]:
        """Every use so far. Raises StorageError: damaged; that is never "nothing spent"."""
        return _entries(self._lines(make=False))

    def heaviest(self, patients: Sequence[str] | None = None) -> list[list[Step]]:
        """The histories that weigh most on these patients, or on anybody. Raises StorageError."""
        entries = self.entries()
        if not entries:
            return [[]]
        if patients is not None:
            return self._heaviest(entries, self._ids(patients)[0])
        everybody = [self._set(c) for c in {e.cohort for e in entries}]
        return self._heaviest(entries, np.unique(np.concatenate(everybody)))

    def step_of(self, charge: Charge, patients: Sequence[str]) -> Step:
        """What a use would cost the patient with most records."""
        return per_patient(charge, max(Counter(patients).values(), default=1))

    def head(self) -> Head:
        """What to hand to somebody else, so that a ledger that was put back is noticed."""
        lines = self._lines(make=False)
        return Head(len(lines), lines[-1]["hash"] if lines else "")

    def noticed(self, elsewhere: Head) -> str | None:
        """What is wrong with this ledger by a head that it once had; None if it only grew."""
        lines = self._lines(make=False)
        if len(lines) < elsewhere.lines:
            return (
                f"The ledger has {len(lines)} lines and had {elsewhere.lines}: it was cut short, "
                "put back or begun anew. Restore the latest copy before anything is trained."
            )
        if elsewhere.lines and lines[elsewhere.lines - 1]["hash"] != elsewhere.hash:
            return (
                f"Line {elsewhere.lines} of the ledger is not the one that it had: its history was "
                "rewritten. Restore the latest copy before anything is trained."
            )
        return None

    def sealed(self, label: str) -> str:
        """A word that only this ledger can give from now on, and that tells a reader nothing.

        It is the last line's hash under the ledger's key, and with another label another word, so
        that nobody can see whether anything was written between two of them. "" of no ledger.
        """
        lines = self._lines(make=False)
        return self._seal(label, lines[-1]) if lines else ""

    def has_sealed(self, label: str, word: str) -> bool:
        """Whether this ledger has all that it had when it gave this word. Raises StorageError."""
        lines = reversed(self._lines(make=False))
        return any(hmac.compare_digest(self._seal(label, line), word) for line in lines)

    def _seal(self, label: str, line: Line) -> str:
        return hmac.new(
            self._key(), f"head\x1f{label}\x1f{line['hash']}".encode(), "sha256"
        ).hexdigest()

    def _heaviest(self, entries: Sequence[Entry], ids: Ids) -> list[list[Step]]:
        sets = {c: self._set(c) for c in {e.cohort for e in entries}}
        return heaviest([(e.cohort, e.step) for e in entries], sets, ids)

    @property
    def _file(self) -> Path:
        return self.folder / "ledger.jsonl"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the ledger cannot be written ({error.strerror}). Nothing was "
                "trained; make room or mend the folder's rights."
            ) from None

    def _lines(self, *, make: bool) -> list[Line]:
        """The whole lines, checked. A last one without its end was never promised: left out."""
        if not self._file.exists():
            if (self.folder / "key").exists():
                raise StorageError(
                    f"{self._file}: is gone, and its key is there. Restore it from a backup: "
                    "without it nobody knows what was spent."
                )
            return self._begun() if make else []
        whole = self._file.read_bytes().rpartition(b"\n")[0].splitlines()
        lines = [_line(text, self._file, number) for number, text in enumerate(whole, 1)]
        if len(lines) <= 1 and not (self.folder / "key").exists():
            # Killed while it was made: without a key nothing can have been reserved.
            return self._begun() if make else []
        previous = ""
        for number, line in enumerate(lines):
            if line.get("number") != number or line.get("previous") != previous:
                raise _broken(self._file, number + 1)
            previous = line["hash"]
        if not lines or lines[0].get("key") != hashlib.sha256(self._key()).hexdigest():
            raise StorageError(
                f"{self.folder / 'key'}: does not belong to the ledger beside it. Restore it "
                "from a backup: without it nobody can say who is in two cohorts."
            )
        return lines

    def _begun(self) -> list[Line]:
        key, lines = os.urandom(32), list[Line]()
        self._file.unlink(missing_ok=True)
        first = {"kind": "open", "when": _now(), "key": hashlib.sha256(key).hexdigest()}
        self._append(lines, first)
        # Last, so that a key means that there was a ledger.
        tensors.write_atomic(self.folder / "key", key)
        (self.folder / "key").chmod(0o600)
        return lines

    def _append(self, lines: list[Line], line: Line) -> None:
        """One line at the end, on the disk when this returns; `lines` grows with it."""
        line = {"number": len(lines), "previous": lines[-1]["hash"] if lines else "", **line}
        line["hash"] = _hash(line)
        new = self._file.open("ab")
        with new as file:
            # What a killed process left of a line is overwritten.
            size = file.tell()
            end = self._file.read_bytes().rfind(b"\n") + 1 if size else 0
            if end != size:
                log.warning("the ledger's last line was not whole; it was never promised")
                file.truncate(end)
            file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not lines:
            self._file.chmod(0o600)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        lines.append(line)

    def _key(self) -> bytes:
        try:
            return (self.folder / "key").read_bytes()
        except FileNotFoundError:
            return b""

    def _ids(self, patients: Sequence[str]) -> tuple[Ids, int]:
        """Sorted keyed hashes of the patients, and the records of the one who has most.

        Two patients with one hash (chance 1 in 10^8 for 600 000) would count as one: too much is
        spent then, never too little.
        """
        key, counts = self._key(), Counter(patients)
        hashes = [hmac.digest(key, p.encode(), "sha256")[:8] for p in counts]
        return np.unique(np.frombuffer(b"".join(hashes), dtype="<u8")), max(counts.values())

    def _keep(self, ids: Ids, digest: str) -> None:
        file = self.folder / f"patients-{digest}.u64"
        if not file.exists():
            tensors.write_atomic(file, ids.tobytes())
            file.chmod(0o600)

    def _set(self, digest: str) -> Ids:
        file = self.folder / f"patients-{digest}.u64"
        try:
            ids: Ids = np.frombuffer(file.read_bytes(), dtype="<u8")
        except (OSError, ValueError):
            ids = np.zeros(0, dtype="<u8")
        if _digest(ids) != digest:
            raise StorageError(
                f"{file}: is missing or damaged. Restore it from a backup: without it nobody "
                "knows whose privacy was spent."
            )
        return ids


def _digest(ids: Ids) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()[:32]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _hash(line: Line) -> str:
    text = json.dumps({k: v for k, v in line.items() if k != "hash"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _line(text: bytes, file: Path, number: int) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        raise _broken(file, number) from None
    if not isinstance(line, dict) or line.get("hash") != _hash(line):
        raise _broken(file, number)
    return line


def _broken(file: Path, number: int) -> StorageError:
    return StorageError(
        f"{file}: line {number} was changed, removed or put in after it was written. Nothing is "
        "trained on such a ledger; restore the latest copy and find out who changed it."
    )


def _entries(lines: Sequence[Line]) -> tuple[Entry, ...]:
    found: dict[int, Entry] = {}
    for line in lines:
        if line["kind"] == "reserve":
            found[line["number"]] = Entry(
                number=line["number"],
                charge=Charge(**line["charge"]),
                cohort=line["cohort"],
                most_records=line["most_records"],
                when=line["when"],
            )
        elif line["kind"] == "settle":
            found[line["entry"]] = replace(found[line["entry"]], settled=True)
    return tuple(found.values())
