"""The token of an invitation: a secret that opens the door once, and the authority to trust.

The gateway asks everybody for a client certificate. An invited site has none yet, so both sides
derive a P-256 key from the token's secret: the coordinator keeps only its public half as a trust
anchor (the secret cannot be had back from it), and the site signs itself a certificate with it.
Who has no token gets no further than the TLS handshake.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfl.common import certificates
from medfl.common.certificates import Certificate, TlsKey, Wanted
from medfl.common.errors import ConfigError, StorageError

_MARK = "medfl1"
_SECRET_BYTES = 20
_CHECK_BYTES = 4
_HALF_DAY_S = 43200.0
# Order of P-256 (SEC 2, 2.4.2).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True)
class Token:
    """site: the name that the coordinator invited. authority: its certificate (DER)."""

    site: str
    authority: bytes
    secret: bytes = field(repr=False)


def new_token(site: str, authority: Certificate) -> Token:
    """A token with a fresh secret."""
    return Token(site, certificates.der_of(authority), secrets.token_bytes(_SECRET_BYTES))


def to_text(token: Token) -> str:
    """One word without spaces: mark, site, and secret, authority and checksum in base64."""
    content = token.secret + token.authority
    text = base64.urlsafe_b64encode(content + _checksum(token.site, content)).decode().rstrip("=")
    return f"{_MARK}.{token.site}.{text}"


def from_text(text: str) -> Token:
    """Inverse of `to_text`; line breaks that a mail program added do not matter.

    Raises:
        ConfigError: it is not a whole token.
    """
    mark, _, rest = "".join(text.split()).partition(".")
    site, _, coded = rest.partition(".")
    try:
        raw = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    content, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if mark != _MARK or len(content) <= _SECRET_BYTES or check != _checksum(site, content):
        raise ConfigError(
            "--token: is not a whole token. Copy all of what `medfl-server invite` printed, from "
            f"{_MARK} to the end"
        )
    token = Token(site, content[_SECRET_BYTES:], content[:_SECRET_BYTES])
    authority_of(token)
    return token


def authority_of(token: Token) -> Certificate:
    """The authority's certificate. Raises ConfigError where the token holds none."""
    try:
        return certificates.load_certificate(token.authority, "--token")
    except StorageError:
        raise ConfigError("--token: holds no authority; ask for a new invitation") from None


def key_of(token: Token) -> TlsKey:
    """The key that both sides derive from the secret (HKDF-SHA-256, RFC 5869)."""
    info = b"medfl invitation " + token.site.encode()
    derived = HKDF(algorithm=hashes.SHA256(), length=48, salt=None, info=info).derive(token.secret)
    # 48 bytes modulo a number of 32: the bias is below 2^-128 (FIPS 186-5, A.2.1).
    return ec.derive_private_key(int.from_bytes(derived) % (_ORDER - 1) + 1, ec.SECP256R1())


def identity_of(token: Token) -> str:
    """The invitation's public name: a digest of the derived key's public half."""
    return certificates.public_digest(key_of(token).public_key())[:32]


def anchor(token: Token, now: float, seconds: float) -> Certificate:
    """What the coordinator keeps: trust in whoever holds the token, for so long."""
    key, name = key_of(token), anchor_name(identity_of(token))
    return certificates.issue(Wanted(name, now, seconds), key.public_key(), name, key)


def guest_certificate(token: Token, now: float) -> tuple[TlsKey, Certificate]:
    """What the invited site shows: a certificate of its own making, for a day around now.

    Generous, so that a clock that is hours off is named by the answer and not by a cut line; how
    long the token serves is the coordinator's to say.
    """
    key, issuer = key_of(token), anchor_name(identity_of(token))
    wanted = Wanted("guest", now - _HALF_DAY_S, 2 * _HALF_DAY_S, use="client")
    return key, certificates.issue(wanted, key.public_key(), issuer, key)


def anchor_name(identity: str) -> str:
    """Issuer name of the guests of one invitation."""
    return f"invitation {identity}"


def _checksum(site: str, content: bytes) -> bytes:
    return hashlib.sha256(site.encode() + b"\0" + content).digest()[:_CHECK_BYTES]
