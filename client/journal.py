"""Lines that are only ever added to, and are on the disk before anything follows from them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from medfl.common.config import decoded
from medfl.common.errors import StorageError
from medfl.common.private_files import private_folder, read_private, sync_folder
from medfl.common.signing import canonical

T = TypeVar("T")


@dataclass(slots=True)
class Journal(Generic[T]):
    """One file of JSON lines, each a frozen dataclass `kind`; one process writes it."""

    file: Path
    kind: type[T]
    _known: list[T] = field(default_factory=list)
    _size: int = 0

    def lines(self) -> list[T]:
        """All lines; one that a crash cut short had no consequence and does not count.

        Raises:
            StorageError: a line is damaged. ConfigError: others may read or change the file.
        """
        size = self.file.stat().st_size if self.file.exists() else 0
        if size != self._size:
            whole = read_private(self.file).rpartition(b"\n")[0].splitlines() if size else []
            try:
                self._known = [decoded(line, self.kind) for line in whole]
            except ValidationError:
                raise StorageError(f"{self.file}: is damaged; restore it from the backup") from None
            self._size = size
        return list(self._known)

    def append(self, line: Any) -> None:
        """Add one line; it is on the disk when this returns. Raises StorageError."""
        self.lines()
        text = canonical(asdict(line)) + b"\n"
        try:
            private_folder(self.file.parent)
            fresh = not self.file.exists()
            handle = os.open(
                self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            with os.fdopen(handle, "r+b") as file:
                end = file.read().rfind(b"\n") + 1
                file.seek(end)
                file.truncate()
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync_folder(self.file.parent)
        except OSError as error:
            raise StorageError(
                f"{self.file}: cannot be written ({error.strerror}); nothing was done"
            ) from None
        self._known.append(line)
        self._size = end + len(text)
