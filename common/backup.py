"""One file that holds a copy of a running service's state, and is checked before it is put back.

A tar archive without compression (models do not compress), 0600. Its last member, manifest.json,
says what must be in it; an archive without one was never finished.

A copy made while the service runs is consistent because files appear whole (written beside, then
renamed) or only grow by lines, and because the caller names them in the order in which a line may
point to another: what points is copied first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import ConfigDict, ValidationError

from medfl import __version__
from medfl.common.config import decoded
from medfl.common.errors import ConfigError, StorageError
from medfl.common.private_files import private_folder, sync_folder, write_private
from medfl.common.signing import canonical

MANIFEST = "manifest.json"
_MAX_MANIFEST = 64 * 1024 * 1024
_BLOCK = 1024 * 1024
# Of processes that run, or unfinished; and secrets of one round, which are to be nowhere else.
_NOT_KEPT = (".lock", ".part", ".pid", ".torn", ".once")


@dataclass(frozen=True, slots=True)
class Manifest:
    """kind: of service. at: seconds since 1970. files: SHA-256 of each. about: for people."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    kind: str
    medfl: str
    at: float
    files: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def below(folder: Path, name: str, leave: frozenset[str] = frozenset()) -> Iterator[Item]:
    """Every kept file below `folder` as `name`/..., in order. leave: paths relative to it."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).as_posix()
        left = any(inner == x or inner.startswith(f"{x}/") for x in leave)
        if path.is_file() and not path.is_symlink() and not left and _is_kept(path.name):
            yield f"{name}/{inner}", path


Item = tuple[str, Path]


def _is_kept(name: str) -> bool:
    return not name.endswith(_NOT_KEPT) and name != "lock"


def save(out: Path, kind: str, items: Iterable[Item], about: dict[str, str]) -> Manifest:
    """Write the archive, whole or not at all.

    Raises:
        StorageError: the disk refused. ConfigError: the file is there already.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists and is not replaced; name another file")
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    files: dict[str, str] = {}
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for name, path in items:
                    with suppress(FileNotFoundError):  # removed since it was listed
                        files[name] = _add(archive, name, path)
                made = Manifest(kind, __version__, round(time.time(), 1), files, about)
                text = canonical(asdict(made))
                archive.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(f"{out}: cannot be written ({error.strerror or error})") from None
    return made


def _add(archive: tarfile.TarFile, name: str, path: Path) -> str:
    with path.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        if path.suffix == ".jsonl":
            # What is being written is no line yet.
            text = source.read(size)
            text = text[: text.rfind(b"\n") + 1]
            archive.addfile(_member(name, len(text)), io.BytesIO(text))
            return hashlib.sha256(text).hexdigest()
        hashing = _Hashing(source)
        archive.addfile(_member(name, size), hashing)
        return hashing.digest.hexdigest()


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, source: io.BufferedReader) -> None:
        self._source = source
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._source.read(size)
        self.digest.update(block)
        return block


def _member(name: str, size: int) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.mode, made.mtime = size, 0o600, int(time.time())
    return made


@dataclass(frozen=True)
class Backup:
    """An archive whose every byte is as its manifest says."""

    path: Path
    manifest: Manifest

    def text(self, name: str) -> bytes | None:
        """The content of a small file; None where it is not in it."""
        if name not in self.manifest.files:
            return None
        with tarfile.open(self.path, mode="r:") as archive:
            source = archive.extractfile(name)
            return b"" if source is None else source.read()

    def put_back(self, name: str, folder: Path) -> int:
        """Write what lies under `name`/ into a new or empty folder; how many files that were.

        Raises:
            ConfigError: the folder holds something. StorageError: the disk refused.
        """
        refuse_full(folder)
        private_folder(folder)
        count = 0
        with tarfile.open(self.path, mode="r:") as archive:
            for member in archive:
                if member.name.startswith(f"{name}/"):
                    place = folder / member.name.removeprefix(f"{name}/")
                    # One by one: those that mkdir makes on the way would be open to others.
                    for above in reversed(place.relative_to(folder).parents):
                        private_folder(folder / above)
                    _write(archive, member, place)
                    count += 1
        return count

    def put_file(self, name: str, path: Path) -> bool:
        """Write one file, if it is in the archive and its place is free; True where it is."""
        content = self.text(name)
        if content is None or path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, content, replace=False)
        return True


def refuse_full(folder: Path) -> None:
    """Raises ConfigError where the folder holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty; a backup is put back into a new folder only")


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = archive.extractfile(member)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            while source is not None and (block := source.read(_BLOCK)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def opened(path: Path, kind: str) -> Backup:
    """A backup of this kind, every file of it checked.

    Raises:
        ConfigError: it is none, or of another kind. StorageError: it is damaged or unfinished.
    """
    try:
        with tarfile.open(path, mode="r:") as archive:
            found, manifest = _checked(path, archive)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (tarfile.TarError, OSError, EOFError):
        raise StorageError(f"{path}: is no backup of medfl, or damaged; take another") from None
    if manifest is None:
        raise StorageError(f"{path}: is unfinished; take another")
    if manifest.kind != kind:
        raise ConfigError(f"{path}: is a backup of {manifest.kind}, not of {kind}")
    if found != manifest.files:
        raise StorageError(f"{path}: does not hold what it says; take another")
    return Backup(path, manifest)


def _checked(path: Path, archive: tarfile.TarFile) -> tuple[dict[str, str], Manifest | None]:
    found: dict[str, str] = {}
    manifest = None
    for member in archive:
        way = PurePosixPath(member.name)
        if not member.isfile() or way.is_absolute() or ".." in way.parts or member.name in found:
            raise StorageError(f"{path}: holds what no backup holds; it was changed")
        source = archive.extractfile(member)
        if source is None:
            continue
        if member.name == MANIFEST:
            manifest = _manifest(path, source.read(_MAX_MANIFEST))
            continue
        digest = hashlib.sha256()
        while block := source.read(_BLOCK):
            digest.update(block)
        found[member.name] = digest.hexdigest()
    return found, manifest


def _manifest(path: Path, text: bytes) -> Manifest:
    try:
        return decoded(text, Manifest)
    except (ValidationError, json.JSONDecodeError):
        raise StorageError(f"{path}: its list of files is damaged; take another") from None
