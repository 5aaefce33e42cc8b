"""Files that only this user may read: keys, certificates and state."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medfl.common.errors import ConfigError, StorageError


def private_folder(path: Path) -> Path:
    """Make `path` with mode 0700 where it is missing. Raises ConfigError, StorageError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_open(path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be made or read ({error.strerror}); name another folder"
        ) from None
    return path


def read_private(path: Path) -> bytes:
    """The content of a file that nobody else may read or change.

    Raises:
        ConfigError: it is missing, or other users may read or write it.
        StorageError: it is empty or cannot be read.
    """
    try:
        _refuse_open(path)
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; check the folder") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    if not content:
        raise StorageError(f"{path}: is empty; restore it from the backup")
    return content


def write_private(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write with mode 0600 in one atomic step; without `replace` an existing file is kept.

    Raises:
        StorageError: the disk refused, or the file exists and must not be replaced.
    """
    # Threads of the gateway may write the same record at once.
    mine = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f".{path.name}.{mine}.part")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            # A rename would replace; a hard link fails where the name is taken.
            os.link(partial, path)
            partial.unlink()
        sync_folder(path.parent)
    except FileExistsError:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: exists and is not replaced; move it away first") from None
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: could not be written ({error.strerror}). Free some space or check the "
            "folder, then run the same command again"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut (POSIX: the folder is a file of its own)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for a short change; waits for its turn. Raises StorageError."""
    handle = _open_lock(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for a process's life.

    Raises:
        StorageError: another process holds it; the message speaks of `what`.
    """
    handle = _open_lock(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{path.parent}: another {what} runs on this folder. Stop it first, or name "
                "another folder."
            ) from None
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened ({error.strerror})") from None


def refuse_writable(path: Path) -> None:
    """Raises ConfigError where everybody on this machine may change the file."""
    if path.stat().st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"{path}: every user of this machine may change it; run: chmod o-w {path}, and read "
            "it before you go on"
        )


def is_full(folder: Path, needed: int = 2**20) -> bool:
    """Whether fewer than `needed` bytes are free on the folder's disk."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize < needed


def refuse_full(folder: Path, needed: int = 2**20) -> None:
    """Raises StorageError where fewer than `needed` bytes are free."""
    if is_full(folder, needed):
        raise StorageError(f"{folder}: the disk is full; free some space. Nothing was done")


def _refuse_open(path: Path) -> None:
    state = path.stat()
    if state.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        kind = "700" if path.is_dir() else "600"
        raise ConfigError(
            f"{path}: other users may read or change it; run: chmod {kind} {path}. If it is a key "
            "that others have read, ask for a new one"
        )
    if state.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path}: belongs to another user; run as its owner")
