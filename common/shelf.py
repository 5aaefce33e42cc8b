"""Large objects as files that two processes of one user share, and tickets that stand for them.

Flower takes an object through HTTP, protobuf and its database at every step. Here whoever sends
lays the object on the shelf and hands Flower a ticket; whoever takes redeems the ticket. Flower
still decides who may send and fetch what, and when an object goes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

from medfl.common.errors import StorageError

# Smaller objects go their usual way.
LARGE = 256 * 1024
_LAID = ".laid"
_HEX = frozenset("0123456789abcdef")


def ticket(object_id: str) -> bytes:
    """What stands for an object in calls.

    It is never the object itself, whose SHA-256 would then have to be part of its own text. It
    gives nothing away: only what lies on the shelf, checked against its name, is worth anything.
    """
    return f"on the shelf: {object_id}".encode()


def is_object_id(text: str) -> bool:
    """Whether it is a SHA-256; what is none must never become part of a path."""
    return len(text) == 64 and _HEX.issuperset(text)


def sha256(*pieces: bytes | memoryview) -> str:
    """SHA-256 of the pieces together, in hex."""
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


class Shelf:
    """Objects in `folder` (0700, files 0600), each named by its SHA-256.

    An object is laid first and kept once the store that owns the shelf has taken its ticket.
    leave: bytes of the disk that stay free, whatever somebody else sends.
    """

    def __init__(self, folder: Path, leave: int = 0) -> None:
        self.folder, self._leave = folder, leave
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def lay(self, object_id: str, *pieces: bytes | memoryview) -> None:
        """Lay an object, given in pieces, ready to be kept.

        Raises:
            ValueError: the content is not the id's. StorageError: the disk refused.
        """
        if not is_object_id(object_id) or sha256(*pieces) != object_id:
            raise ValueError("the content is not the object's")
        self.lay_own(object_id, *pieces)

    def lay_own(self, object_id: str, *pieces: bytes | memoryview) -> None:
        """Lay an object whose id this process itself has worked out. Raises StorageError."""
        mine = f"{os.getpid()}-{threading.get_ident()}"
        partial = self.folder / f".{object_id}.{mine}.part"
        try:
            if self._leave and _free(self.folder) < self._leave:
                raise OSError(errno.ENOSPC, "the disk is almost full")
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb", buffering=0) as file:
                for piece in pieces:
                    left = memoryview(piece)
                    while left:
                        left = left[file.write(left) :]
            partial.replace(self._laid(object_id))
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StorageError(
                f"{self.folder}: an object could not be written ({error.strerror}). Free some space"
            ) from None

    def laid(self, object_id: str) -> Path | None:
        """The file of an object that is laid and not kept yet."""
        file = self._laid(object_id)
        return file if is_object_id(object_id) and file.exists() else None

    def keep(self, object_id: str) -> bool:
        """Keep a laid object. False: it is not there."""
        try:
            self._laid(object_id).replace(self.folder / object_id)
        except FileNotFoundError:
            return False
        return True

    def has(self, object_id: str) -> bool:
        """Whether the object is kept."""
        return is_object_id(object_id) and (self.folder / object_id).exists()

    def read(self, object_id: str) -> bytes | None:
        """A kept object; None where there is none."""
        if not is_object_id(object_id):
            return None
        try:
            return (self.folder / object_id).read_bytes()
        except FileNotFoundError:
            return None

    def take_back(self, object_id: str) -> None:
        """Remove an object that was laid and that nobody keeps."""
        if is_object_id(object_id):
            self._laid(object_id).unlink(missing_ok=True)

    def drop(self, object_id: str) -> None:
        """Remove a kept object."""
        if is_object_id(object_id):
            (self.folder / object_id).unlink(missing_ok=True)

    def kept(self) -> list[str]:
        """Ids of all kept objects."""
        return [file.name for file in self.folder.iterdir() if is_object_id(file.name)]

    def sweep(self, *, all_of_it: bool = False) -> None:
        """Remove what an earlier process laid or half wrote; or everything."""
        for file in self.folder.iterdir():
            if all_of_it or not is_object_id(file.name):
                file.unlink(missing_ok=True)

    def _laid(self, object_id: str) -> Path:
        return self.folder / f"{object_id}{_LAID}"
