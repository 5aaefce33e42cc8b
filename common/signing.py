"""Ed25519 signatures over canonical JSON: one form of every value, so one digest and one meaning.

A signature covers a purpose and a value, so that what was signed as one thing (an approval) can
never be shown as another (a withdrawal).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from medfl.common.errors import StorageError
from medfl.common.private_files import read_private, write_private

SigningKey = Ed25519PrivateKey
Plain = Mapping[str, Any]


def canonical(value: Any) -> bytes:
    """Compact JSON with sorted keys in UTF-8. Raises ValueError for NaN and infinities."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def new_key(path: Path) -> SigningKey:
    """Make a key and keep it in `path` with mode 0600; an existing file is never replaced."""
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(path, content, replace=False)
    return key


def load_key(path: Path) -> SigningKey:
    """Read a key file.

    Raises:
        ConfigError: missing, or others may read it.
        StorageError: empty, damaged, or of another kind.
    """
    try:
        key = load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError):
        raise StorageError(f"{path}: is not a whole key file; restore it from the backup") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise StorageError(f"{path}: is not an Ed25519 key; restore it from the backup")
    return key


def public_of(key: SigningKey) -> str:
    """The public half: 32 bytes as 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def fingerprint(content: bytes) -> str:
    """SHA-256 in groups of four digits, for two people to compare over the telephone."""
    digits = hashlib.sha256(content).hexdigest()
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def key_fingerprint(public: str) -> str:
    """Of a public key (hex): the first half of `fingerprint`, 128 bits."""
    return fingerprint(bytes.fromhex(public))[:39]


def sign(key: SigningKey, purpose: str, plain: Plain) -> str:
    """Signature over purpose and value, as base64 text."""
    return base64.b64encode(key.sign(_covered(purpose, plain))).decode()


def is_signed(public: str, purpose: str, plain: Plain, signature: str) -> bool:
    """Whether `signature` is that of `public` (hex) over purpose and value; never raises."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            base64.b64decode(signature, validate=True), _covered(purpose, plain)
        )
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def _covered(purpose: str, plain: Plain) -> bytes:
    return b"medfl " + purpose.encode() + b"\n" + canonical(plain)
