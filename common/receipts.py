"""Signed updates: who sent which content for which exchange, and that it counts only once.

The channel already says which site speaks. The seal says it again inside, over the content, so
that a message can neither be sent twice, nor in another's name, nor for another round, whoever
carried it between the site's runner and the place where updates are summed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, ValidationError

from medfl.common import tensors
from medfl.common.config import decoded
from medfl.common.errors import PolicyRefused, StorageError
from medfl.common.messages import Envelope
from medfl.common.signing import SigningKey, canonical, is_signed, sign

log = logging.getLogger(__name__)

_PURPOSE = "message"
_GROUP = "seal"
_MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Seal:
    """What a signature over one message says.

    study: digest. run: name of the run. kind: prepare, round or finish; with "ask " before it, the
        coordinator's instruction to the site. asked: SHA-256 of the JSON part of the instruction
        that is answered, `asked_by`. attempt: a round that is repeated after a fault has another.
        site: who sends (or, for an instruction, to whom). content: SHA-256 of the message,
        `content_of`. signature: base64, by the sender's pinned key.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    study: str
    run: str
    kind: str
    asked: str
    round: int
    attempt: int
    site: str
    content: str
    signature: str = ""

    @property
    def slot(self) -> str:
        """The one place that a message with this seal may fill."""
        exchange = f"{self.study}/{self.run}/{self.kind}/{self.asked}"
        return f"{exchange}/{self.round}/{self.attempt}/{self.site}"


def content_of(envelope: Envelope) -> str:
    """SHA-256 over the JSON part and every array's name, dtype, shape and bytes."""
    sha = hashlib.sha256(hashlib.sha256(envelope.about.encode()).digest())
    for group in sorted(envelope.arrays):
        sha.update(hashlib.sha256(group.encode()).digest())
        sha.update(bytes.fromhex(tensors.digest(envelope.arrays[group])))
    return sha.hexdigest()


def asked_by(about: str) -> str:
    """Names the instruction whose JSON part this is; two of one round differ in it."""
    return hashlib.sha256(about.encode()).hexdigest()


def attach(envelope: Envelope, sealed: Seal) -> Envelope:
    """The message with its seal, as one more group of arrays."""
    text = np.frombuffer(to_text(sealed).encode(), dtype=np.uint8)
    return replace(envelope, arrays={**envelope.arrays, _GROUP: {_GROUP: text}})


def detach(envelope: Envelope) -> tuple[Envelope, Seal | None]:
    """Inverse of `attach`; None where there is no seal. Raises PolicyRefused for nonsense."""
    if _GROUP not in envelope.arrays:
        return envelope, None
    rest = {name: group for name, group in envelope.arrays.items() if name != _GROUP}
    found = envelope.arrays[_GROUP].get(_GROUP)
    if found is None or found.dtype != np.uint8 or found.nbytes > _MAX_TEXT:
        raise PolicyRefused("A message's seal is malformed.")
    text = found.tobytes().decode("utf-8", "replace")
    return replace(envelope, arrays=rest), from_text(text)


def seal(key: SigningKey, bare: Seal) -> Seal:
    """The same seal with its signature."""
    return replace(bare, signature=sign(key, _PURPOSE, _signed_part(bare)))


def to_text(sealed: Seal) -> str:
    """As JSON, to travel beside the message."""
    return canonical(asdict(sealed)).decode()


def from_text(text: str) -> Seal:
    """Inverse of `to_text`. Raises PolicyRefused for anything else."""
    try:
        return decoded(text.encode(), Seal)
    except ValidationError:
        raise PolicyRefused("A message has no seal of this version of medfl.") from None


def check(sealed: Seal, expected: Seal, public: str | None) -> None:
    """Compare with what this exchange expects, then check the signature.

    expected: everything but the signature, from the receiver's own knowledge: the site from the
        certificate, the content computed from the message that arrived.

    Raises:
        PolicyRefused: another exchange, another's name, other content, or no valid signature.
    """
    for name, value in _signed_part(expected).items():
        if getattr(sealed, name) != value:
            raise PolicyRefused(f"A message's seal names another {name} than this exchange.")
    if public is None or not is_signed(public, _PURPOSE, _signed_part(sealed), sealed.signature):
        raise PolicyRefused(f"A message for {sealed.site} is not signed by its pinned key.")


@dataclass(slots=True)
class Seen:
    """The slots that have been filled, on disk, so that a restart forgets none.

    path: JSON lines, appended and flushed before a message counts.
    """

    path: Path
    _known: dict[str, str] = field(default_factory=dict)
    _loaded: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, sealed: Seal) -> None:
        """Fill the seal's slot.

        Raises:
            PolicyRefused: it was filled before, with the same content (a replay) or another.
            StorageError: the disk refused; the message does not count.
        """
        with self._lock:
            if not self._loaded:
                self._known.update(_load(self.path))
                self._loaded = True
            earlier = self._known.get(sealed.slot)
            if earlier is not None:
                what = "was sent before" if earlier == sealed.content else "has a second content"
                raise PolicyRefused(
                    f"A message of {sealed.site} for round {sealed.round}, attempt "
                    f"{sealed.attempt}, {what}; it does not count again."
                )
            _append(self.path, {"slot": sealed.slot, "content": sealed.content})
            self._known[sealed.slot] = sealed.content


def _load(path: Path) -> dict[str, str]:
    """Filled slots; an unfinished last line is cut off, any other damage is an error."""
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole, _, torn = raw.rpartition(b"\n")
    if torn:
        # Its message was never counted: a slot counts only after its line is on the disk.
        log.warning("an unfinished line of %d bytes was cut off the list of messages", len(torn))
        os.truncate(path, len(raw) - len(torn))
    known = {}
    for line in whole.splitlines():
        try:
            plain = json.loads(line)
            known[str(plain["slot"])] = str(plain["content"])
        except (ValueError, KeyError, TypeError):
            raise StorageError(
                f"{path}: is damaged, so a message sent twice could count twice. Restore it from "
                "the backup, or start a new run"
            ) from None
    return known


def _append(path: Path, plain: Mapping[str, str]) -> None:
    line = canonical(plain) + b"\n"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(handle).st_size
            if os.write(handle, line) != len(line):
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def _signed_part(sealed: Seal) -> dict[str, str | int]:
    return {key: value for key, value in asdict(sealed).items() if key != "signature"}
