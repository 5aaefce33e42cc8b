"""What is said in one secure sum, and the keys that follow from it.

Every key is derived with the digest of the `Agreement` as HKDF's salt. Sites to whom different
things were told (another roster, threshold, weight cap, run or round) so derive different streams,
and what the coordinator then adds up is noise.
"""

from __future__ import annotations

import binascii
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import ConfigDict, ValidationError

from medfl.common.config import decoded
from medfl.common.errors import FederationError
from medfl.common.secure.shamir import BYTES, PRIME
from medfl.common.signing import SigningKey, canonical, is_signed, sign

_STRICT = ConfigDict(extra="forbid", strict=True)
_PURPOSE = "secure sum keys"
_NONCE = 12

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exchange:
    """Which sum this is. attempt: a round that is repeated after a fault has another."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    study: str
    run: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Advert:
    """A site's public keys of one exchange, hex. own: commitment to the key of its own mask.

    signature: of the site's identity over everything else and the exchange.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    site: str
    sharing: str
    masking: str
    own: str
    signature: str = ""


@dataclass(frozen=True)
class Agreement:
    """What all sites of one exchange must have been told alike.

    threshold: shares that give a secret back. weight_cap: power of two that no site's weight
        exceeds. adverts: in order of the names; a site's place in it, from 1, is its share's point.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    exchange: Exchange
    threshold: int
    weight_cap: int
    adverts: tuple[Advert, ...]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form."""
        return hashlib.sha256(canonical(asdict(self))).digest()

    @cached_property
    def by_site(self) -> Mapping[str, Advert]:
        """The adverts by name."""
        return {advert.site: advert for advert in self.adverts}

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(advert.site for advert in self.adverts)


@dataclass(frozen=True, slots=True)
class Outbox:
    """Sealed shares of one site by receiver, hex."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    shares: dict[str, str]


@dataclass(frozen=True, slots=True)
class Present:
    """The sites that have shared: those that all masks are made for.

    ahead: the answer is to hold keys for the next round, too.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    sites: tuple[str, ...]
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Unmask:
    """alive: whose masked updates arrived. dead: who shared and then did not send one.

    inbox: the sealed shares for the asked site, by sender. ahead: what is to be agreed for the next
    round, so that its keys and shares cost no exchanges of their own.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    alive: tuple[str, ...]
    dead: tuple[str, ...]
    inbox: dict[str, str]
    ahead: Agreement | None = None


@dataclass(frozen=True, slots=True)
class Revealed:
    """One site's shares, hex: of each living site's own mask, of each dead one's masking key."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    own: dict[str, str]
    masking: dict[str, str]


@dataclass(frozen=True, slots=True)
class Unmasked:
    """The answer to `Unmask`. ahead: sealed shares for the next round, if that was agreed."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    revealed: Revealed
    ahead: Outbox | None = None


def as_plain(message: Any) -> dict[str, Any]:
    """As plain JSON values."""
    return asdict(message)


def from_plain(plain: Mapping[str, Any], kind: type[T]) -> T:
    """Inverse of `as_plain`. Raises FederationError for anything else, without repeating it."""
    try:
        return decoded(canonical(dict(plain)), kind)
    except (ValidationError, ValueError, RecursionError):
        raise FederationError(
            f"A message of a secure sum does not have the fields of {kind.__name__}. Coordinator "
            "and hospitals must run the same version of medfl."
        ) from None


def threshold_of(share: float, sites: int) -> int:
    """The smallest number that is more than this share of the sites."""
    return math.floor(share * sites) + 1


def signed_advert(exchange: Exchange, bare: Advert, key: SigningKey) -> Advert:
    """The advert with its signature."""
    return Advert(
        site=bare.site,
        sharing=bare.sharing,
        masking=bare.masking,
        own=bare.own,
        signature=sign(key, _PURPOSE, _signed_part(exchange, bare)),
    )


def is_genuine(exchange: Exchange, advert: Advert, public: str) -> bool:
    """Whether the site whose identity is `public` made this advert for this exchange."""
    return is_signed(public, _PURPOSE, _signed_part(exchange, advert), advert.signature)


def _signed_part(exchange: Exchange, advert: Advert) -> dict[str, Any]:
    plain = {**asdict(exchange), **asdict(advert)}
    plain.pop("signature")
    return plain


def public_of(secret: int) -> str:
    """The X25519 public key of a secret, hex."""
    return _private(secret).public_key().public_bytes_raw().hex()


def commitment(site: str, own: int) -> str:
    """SHA-256 of the key of a site's own mask, hex: it says nothing about 255 random bits."""
    text = b"medfl secure sum own mask\n" + site.encode() + b"\n" + _bytes(own)
    return hashlib.sha256(text).hexdigest()


def own_stream(agreement: Agreement, site: str, own: int) -> bytes:
    """Key of the stream that hides a site's update by itself."""
    return _derived(_bytes(own), agreement, f"own mask\n{site}")


def pair_stream(
    agreement: Agreement, present: tuple[str, ...], secret: int, site: str, peer: str
) -> bytes:
    """Key of the stream that `site` (whose masking secret this is) and `peer` have in common.

    present: whom masks are made for; who was told others derives another stream.
    """
    shared = _shared(secret, agreement.by_site[peer].masking)
    pair = "\n".join(sorted((site, peer)))
    whom = hashlib.sha256(canonical(list(present))).hexdigest()
    return _derived(shared, agreement, f"pair mask\n{pair}\n{whom}")


def seal_shares(
    agreement: Agreement, secret: int, site: str, to: str, masking: int, own: int
) -> str:
    """Two shares for `to`, which nobody else can read or change; secret: `site`'s sharing key."""
    nonce = os.urandom(_NONCE)
    cipher = ChaCha20Poly1305(_letter_key(agreement, secret, site, to, to))
    sealed = cipher.encrypt(nonce, _bytes(masking) + _bytes(own), agreement.digest)
    return (nonce + sealed).hex()


def open_shares(
    agreement: Agreement, secret: int, site: str, sender: str, sealed: str
) -> tuple[int, int]:
    """Inverse of `seal_shares` at the receiver `site`: shares of masking and own secret.

    Raises:
        FederationError: it was not sealed by `sender` for this site and exchange.
    """
    cipher = ChaCha20Poly1305(_letter_key(agreement, secret, sender, site, sender))
    try:
        raw = binascii.unhexlify(sealed)
        plain = cipher.decrypt(raw[:_NONCE], raw[_NONCE:], agreement.digest)
        return integer(plain[:BYTES].hex()), integer(plain[BYTES:].hex())
    except (InvalidTag, ValueError):
        raise FederationError(f"The shares of {sender} cannot be opened here.") from None


def as_hex(element: int) -> str:
    """An element of the field as 64 hexadecimal digits."""
    return _bytes(element).hex()


def integer(text: str) -> int:
    """Inverse of `as_hex`. Raises ValueError for anything else."""
    raw = bytes.fromhex(text)
    value = int.from_bytes(raw, "little")
    if len(raw) != BYTES or value >= PRIME:
        raise ValueError("not an element of the field")
    return value


def _letter_key(agreement: Agreement, secret: int, sender: str, to: str, other: str) -> bytes:
    shared = _shared(secret, agreement.by_site[other].sharing)
    return _derived(shared, agreement, f"shares\n{sender}\n{to}")


def _shared(secret: int, public: str) -> bytes:
    """X25519 (RFC 7748). Raises FederationError for a point that gives no secret away or none."""
    try:
        point = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        return _private(secret).exchange(point)
    except ValueError:
        raise FederationError("A public key of a secure sum is no key.") from None


def _derived(material: bytes, agreement: Agreement, purpose: str) -> bytes:
    """HKDF (RFC 5869) with SHA-256."""
    info = b"medfl secure sum\n" + purpose.encode()
    return HKDF(SHA256(), 32, salt=agreement.digest, info=info).derive(material)


def _private(secret: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_bytes(secret))


def _bytes(element: int) -> bytes:
    return element.to_bytes(BYTES, "little")
