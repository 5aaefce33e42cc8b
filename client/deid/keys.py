"""The site's secret, and the pseudonyms that only its holder can make again."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from medfl.common.errors import ConfigError, StorageError
from medfl.common.site import Site

_BYTES = 32
_DAY_S = 86_400
# Images move into the past by one to ten years, so that no date lies in the future.
_SHIFT_S = (365 * _DAY_S, 3650 * _DAY_S)


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Keyed replacements: the same value under the same secret always becomes the same."""

    secret: bytes = field(repr=False)

    def _hash(self, kind: str, value: str) -> bytes:
        text = f"{kind}\0{value}".encode("utf-8", "surrogateescape")
        return hmac.new(self.secret, text, hashlib.sha256).digest()

    def uid(self, uid: str) -> str:
        """`2.25.` and the first 128 bits as a decimal number (PS3.5 section B.2)."""
        return f"2.25.{int.from_bytes(self._hash('uid', uid.strip(chr(0) + ' '))[:16], 'big')}"

    def patient(self, patient: str) -> str:
        """80 bits in base 32, for Patient ID and Patient's Name alike."""
        return "P" + base64.b32encode(self._hash("patient", patient)[:10]).decode("ascii")

    def shift_s(self, patient: str) -> int:
        """Seconds to add to every date and time of this patient; negative."""
        low, high = _SHIFT_S
        return -(low + int.from_bytes(self._hash("dates", patient)[:8], "big") % (high - low))


def cases_key(secret: bytes) -> bytes:
    """The key of the hashes that stand for cases and patients in cohorts, caches and on pages."""
    return hmac.new(secret, b"cases", hashlib.sha256).digest()


def withdrawn_hash(secret: bytes, patient: str) -> str:
    """How a patient stands on the list of those who have withdrawn consent."""
    return hmac.new(
        secret, f"withdrawn\0{patient.strip()}".encode(errors="surrogateescape"), hashlib.sha256
    ).hexdigest()


def secret_path(site: Site) -> Path:
    """`key` of [deid], else a file beside the cache."""
    return site.deid.key or site.cache.path.parent / ".medfl-deid.key"


def user_secret_path() -> Path:
    """For use without a site file: below the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "medfl" / "deid.key"


def load_secret(path: Path) -> bytes:
    """The secret in `path`; made with mode 0600 where there is none.

    Raises:
        ConfigError: others may read or change the file, or it is not such a file.
        StorageError: it cannot be read or written.
    """
    try:
        with suppress(FileExistsError):
            _make(path)
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_mode & 0o077:
                raise ConfigError(
                    f"{path}: other users may read the key of the pseudonyms; run `chmod 600` on "
                    "it, and replace it if they may have done so"
                )
            text = file.read(4 * _BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise StorageError(
            f"{path}: the key of the pseudonyms cannot be read or made ({error.strerror})"
        ) from None
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != _BYTES:
        raise ConfigError(f"{path}: is not a key of medfl; restore it from the backup")
    return secret


def _make(path: Path) -> None:
    """Write a new secret, whole or not at all; raises FileExistsError where one is there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        raise FileExistsError
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A link fails where another process was first; a rename would replace its key.
        os.link(partial, path)
    finally:
        partial.unlink()
