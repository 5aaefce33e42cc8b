"""What a file holds, whatever its name: SHA-256 of the content, remembered while unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medfl.client.data.cases import CaseRef
from medfl.common.errors import CaseError

log = logging.getLogger(__name__)

_FILE = "fingerprints.json"


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Remembered hashes: hash of path, size and mtime -> hash of the content.

    known: mutable on purpose, it fills as files are read; paths are hashed because their names
    may hold a patient's. seen: content by path within this run, for files of many cases.
    """

    known: dict[str, str] = field(default_factory=dict)
    seen: dict[Path, str] = field(default_factory=dict)

    def of_file(self, path: Path) -> str:
        """Raises CaseError("file_missing" or "unreadable")."""
        if path in self.seen:
            return self.seen[path]
        try:
            state = path.stat()
            text = f"{path.absolute()}\0{state.st_size}\0{state.st_mtime_ns}"
            place = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
            if place not in self.known:
                with path.open("rb") as file:
                    self.known[place] = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise CaseError("file_missing", path.name) from None
        except OSError as error:
            raise CaseError("unreadable", f"{path.name}: {error.strerror}") from None
        self.seen[path] = self.known[place]
        return self.known[place]

    def of_case(self, ref: CaseRef) -> tuple[str, str]:
        """(image, image and mask) of one case. Raises CaseError as `of_file`."""
        image = _join([*(self.of_file(f) for f in ref.files), str(ref.index)])
        declared = [ref.orientation] if ref.orientation else []
        mask = _join([image, *(self.of_file(f) for f in ref.mask_files), *declared])
        return image, mask


def _join(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load_fingerprints(folder: Path) -> Fingerprints:
    """What the last run remembered; nothing where there is no such file or it is damaged."""
    try:
        plain = json.loads((folder / _FILE).read_text(encoding="ascii"))
        return Fingerprints({str(k): str(v) for k, v in plain.items()})
    except FileNotFoundError:
        return Fingerprints()
    except (OSError, ValueError, AttributeError):
        log.warning("the remembered fingerprints are damaged; the files are read again")
        return Fingerprints()


def save_fingerprints(folder: Path, prints: Fingerprints) -> None:
    """Replace the remembered hashes at once. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Another process may have remembered other files meanwhile.
    known = load_fingerprints(folder).known | prints.known
    handle, name = tempfile.mkstemp(prefix=".unfinished-", suffix=".json", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            json.dump(known, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, folder / _FILE)
    finally:
        Path(name).unlink(missing_ok=True)  # where it did not get there, for whatever reason
