"""Small records that a command keeps between its runs: one JSON file each, whole or not there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from medfl.common.config import decoded
from medfl.common.errors import StorageError
from medfl.common.private_files import private_folder, read_private, write_private
from medfl.common.signing import canonical

T = TypeVar("T")


def save_record(path: Path, record: Any) -> None:
    """Replace the file by this frozen dataclass in one step. Raises StorageError."""
    private_folder(path.parent)
    write_private(path, canonical(asdict(record)) + b"\n")


def load_record(path: Path, kind: type[T]) -> T | None:
    """The record, or None where there is none.

    Raises:
        StorageError: the file is damaged. ConfigError: others may read or change it.
    """
    if not path.exists():
        return None
    try:
        return decoded(read_private(path), kind)
    except ValidationError:
        raise StorageError(f"{path}: is damaged; restore it from the backup") from None


def load_records(folder: Path, kind: type[T]) -> list[T]:
    """All records of a folder, in order of file name."""
    found = (load_record(path, kind) for path in sorted(folder.glob("*.json")))
    return [record for record in found if record is not None]
