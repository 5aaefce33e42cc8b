"""The cache of prepared cases: flat memory-mapped files with a JSON index, written all or nothing.

One entry is one cohort under one preprocessing, in a folder named by its key:
    inputs.bin, masks.bin   the cases' arrays behind each other, without any header
    index.json              offset, shape and dtype of each case, or the reason why it is left out
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.preprocess import Facts, Prepared
from medfl.common.errors import CaseError, StorageError
from medfl.common.site import Cache
from medfl.common.study import Study

log = logging.getLogger(__name__)

# Raise when readers or preprocessing change their results.
FORMAT_VERSION = 5
_NAMES = ("inputs.bin", "masks.bin")
_DTYPES = ("float32", "uint8")
_UNFINISHED = ".unfinished-"

# Bytes that this process may still add to a cache (folder, max_gb) before it looks at all of it.
_room: dict[tuple[Path, float], float] = {}

Array = NDArray[np.generic]
Outcome = Prepared | CaseError


@dataclass(frozen=True, slots=True)
class Slots:
    """Arrays of several shapes in one flat file; `[i]` is a view."""

    flat: Array
    places: tuple[tuple[int, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Array:
        start, shape = self.places[index]
        return self.flat[start : start + int(np.prod(shape))].reshape(shape)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one candidate: its facts, or the reason why it is left out."""

    reason: str = ""
    detail: str = ""
    facts: Facts | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """Prepared cases by position among the usable ones; `entries` has one item a candidate.

    inputs, masks: one array (N, ...) where all shapes agree, else `Slots`; masks may be None.
    """

    inputs: Array | Slots
    masks: Array | Slots | None
    entries: tuple[Entry, ...]


def entry_key(fingerprints: Sequence[str], study: Study) -> str:
    """SHA-256 over the candidates' contents, in order, and everything that shapes the result."""
    plain = {
        "version": FORMAT_VERSION,
        "image": asdict(study.image) if study.image else None,
        "task": asdict(study.task),
        "candidates": list(fingerprints),
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def in_memory(outcomes: Iterable[Outcome]) -> Stored:
    """The same as a cache entry, without a disk."""
    images: list[Array] = []
    masks: list[Array] = []
    entries: list[Entry] = []
    seen: set[str] = set()
    for outcome in outcomes:
        entry = _entry(outcome, seen)
        entries.append(entry)
        if isinstance(outcome, Prepared) and not entry.reason:
            images.append(outcome.image)
            if outcome.mask is not None:
                masks.append(outcome.mask)
    return Stored(_joined(images), _joined(masks) if masks else None, tuple(entries))


def _joined(arrays: list[Array]) -> Array | Slots:
    if len({a.shape for a in arrays}) <= 1:
        return np.stack(arrays) if arrays else np.zeros((0,), dtype=np.float32)
    flat = np.concatenate([a.ravel() for a in arrays])
    return _view(flat, [list(a.shape) for a in arrays])


def _entry(outcome: Outcome, seen: set[str]) -> Entry:
    if isinstance(outcome, CaseError):
        return Entry(outcome.reason, outcome.detail)
    # Copies that differ as files (other header, other compression) agree as prepared images.
    content = hashlib.sha256(np.ascontiguousarray(outcome.image).data).hexdigest()
    if content in seen:
        return Entry("duplicate")
    seen.add(content)
    return Entry(facts=outcome.facts)


def read_entry(cache: Cache, key: str) -> Stored | None:
    """The entry of this key, or None where there is none; a damaged one is removed, aloud."""
    folder = cache.path / key
    if not (folder / "index.json").is_file():
        return None
    try:
        stored = _read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cache is damaged (%s); it is built again", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(folder)
    return stored


def _read(folder: Path) -> Stored:
    text = (folder / "index.json").read_bytes()
    head, _, body = text.partition(b"\n")
    if hashlib.sha256(body).hexdigest() != head.decode("ascii"):
        raise ValueError("its index does not match its checksum")
    index = json.loads(body)
    written = index.get("boot") is None or index["boot"] == _boot()
    parts: list[Array | Slots | None] = []
    for name, dtype, file in zip(_NAMES, _DTYPES, index["files"], strict=True):
        path = folder / name
        _verify(path, file, written)
        if not file["shapes"]:
            parts.append(None)
            continue
        flat = np.memmap(path, dtype=dtype, mode="r")
        parts.append(_view(flat, file["shapes"]))
    inputs = np.zeros((0,), dtype=np.float32) if parts[0] is None else parts[0]
    return Stored(inputs, parts[1], tuple(_entry_from_plain(e) for e in index["entries"]))


def _boot() -> str | None:
    """Names this start of the machine, None where it may not be known: until the next start the
    system has what was written, on the disk or not yet."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _verify(path: Path, file: dict[str, Any], written: bool) -> None:
    """Size always; the checksum where the file was touched since, or may not be `written`."""
    state = path.stat()
    if state.st_size != file["size"]:
        raise ValueError(f"{path.name} has {state.st_size} bytes instead of {file['size']}")
    if written and state.st_mtime_ns == file["mtime_ns"]:
        return
    crc = 0
    with path.open("rb") as opened:
        while block := opened.read(1 << 24):
            crc = zlib.crc32(block, crc)
    if crc != file["crc32"]:
        raise ValueError(f"{path.name} does not match its checksum")


def _view(flat: Array, shapes: list[list[int]]) -> Array | Slots:
    """One (N, ...) view where all shapes agree, else a view a case; copies nothing."""
    sizes = [int(np.prod(s)) for s in shapes]
    if sum(sizes) != len(flat):
        raise ValueError("its index does not match its files")
    if len({tuple(s) for s in shapes}) == 1:
        return flat.reshape(len(shapes), *shapes[0])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Slots(flat, tuple((int(a), tuple(s)) for a, s in zip(starts, shapes, strict=True)))


def _entry_to_plain(entry: Entry) -> dict[str, Any]:
    # A detail may quote a file name or a header, and those are not for the cache.
    facts = entry.facts and {f.name: getattr(entry.facts, f.name) for f in fields(entry.facts)}
    return {"reason": entry.reason, "detail": "", "facts": facts}


def _entry_from_plain(plain: dict[str, Any]) -> Entry:
    facts = plain["facts"]
    if facts is not None:
        facts = Facts(**facts | {n: tuple(facts[n]) for n in ("size", "spacing_mm")})
    return Entry(plain["reason"], plain["detail"], facts)


def build_entry(
    cache: Cache, key: str, outcomes: Iterable[Outcome], *, durable: bool = True
) -> Stored:
    """Write the entry and return it mapped.

    durable: whether to wait until the disk has it. What a power cut takes of another entry is found
    by its checksum after the next start.

    Raises:
        StorageError: the disk refused; nothing half-written is left.
    """
    with _disk(cache):
        cache.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(cache)
        folder = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{os.getpid()}-", dir=cache.path))
    try:
        with _disk(cache):
            _write(folder, outcomes, durable)
            try:
                folder.rename(cache.path / key)
            except OSError:
                # Somebody else finished the same entry first; theirs is as good.
                if not (cache.path / key / "index.json").is_file():
                    raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    stored = read_entry(cache, key)
    if stored is None:
        raise StorageError(
            f"The cache in {cache.path} cannot be read back. Check the disk, or name another "
            "folder as cache.path in site.toml."
        )
    _keep_below(cache, key)
    return stored


@contextmanager
def _disk(cache: Cache) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The cache in {cache.path} cannot be written: {error.strerror}. Make room or name "
            "another folder as cache.path in site.toml; nothing half-written was left."
        ) from None


def _write(folder: Path, outcomes: Iterable[Outcome], durable: bool) -> None:
    boot = None if durable else _boot()
    durable = boot is None
    shapes: tuple[list[list[int]], list[list[int]]] = ([], [])
    crcs, entries, seen = [0, 0], [], set[str]()
    with (folder / _NAMES[0]).open("wb") as inputs, (folder / _NAMES[1]).open("wb") as masks:
        files: tuple[BinaryIO, BinaryIO] = (inputs, masks)
        for outcome in outcomes:
            entry = _entry(outcome, seen)
            entries.append(_entry_to_plain(entry))
            if isinstance(outcome, CaseError) or entry.reason:
                continue
            for i, array in enumerate((outcome.image, outcome.mask)):
                if array is not None:
                    data = np.ascontiguousarray(array, dtype=_DTYPES[i]).data.cast("B")
                    files[i].write(data)
                    crcs[i] = zlib.crc32(data, crcs[i])
                    shapes[i].append(list(array.shape))
        for file in files:
            _flush(file, durable)
    described = []
    for name, crc, shape in zip(_NAMES, crcs, shapes, strict=True):
        state = (folder / name).stat()
        described.append(
            {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "crc32": crc, "shapes": shape}
        )
    index = {"files": described, "entries": entries, "boot": boot}
    body = json.dumps(index, separators=(",", ":")).encode()
    with (folder / "index.json").open("wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        _flush(file, durable)


def _flush(file: BinaryIO, durable: bool) -> None:
    file.flush()
    if durable:
        os.fsync(file.fileno())


def _sweep(cache: Cache) -> None:
    """Remove what was left unfinished by processes that are gone.

    A day old as well: another container's processes cannot be seen from here.
    """
    for folder in cache.path.glob(f"{_UNFINISHED}*-*"):
        pid = folder.name.removeprefix(_UNFINISHED).partition("-")[0]
        gone = not Path(f"/proc/{pid}").exists()
        if gone and _last_used(folder) < time.time() - 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    """Modification time; 0 where another process has just removed the folder."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_in(folder: Path) -> int:
    try:
        return sum(f.stat().st_size for f in folder.iterdir())
    except FileNotFoundError:
        return 0


def _keep_below(cache: Cache, new: str) -> None:
    """Remove old entries where max_gb is passed, without a look at all of them for each new one.

    Eight processes may use up the room that each of them saw, so that each takes an eighth.
    """
    place = (cache.path, cache.max_gb)
    _room[place] = _room.get(place, 0.0) - _bytes_in(cache.path / new)
    if _room[place] < 0:
        _room[place] = (cache.max_gb * 1e9 - _remove_oldest(cache, keep=new)) / 8


def _remove_oldest(cache: Cache, keep: str) -> int:
    """Remove the entries unused for longest until the rest fits in max_gb; `keep` stays.

    Returns the bytes of what is left.
    """
    entries = [p.parent for p in cache.path.glob("*/index.json") if p.parent.name != keep]
    total = kept = _bytes_in(cache.path / keep)
    for folder in sorted(entries, key=_last_used, reverse=True):
        size = _bytes_in(folder)
        total += size
        if total > cache.max_gb * 1e9:
            log.info("removing an old cache entry to stay below %.1f GB", cache.max_gb)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            kept += size
    return kept
