"""X.509 as medfl uses it: one private authority a federation, P-256 keys, names that mean little.

What a certificate may do is decided by its fingerprint in the coordinator's state, not by the name
in it; the name is for people and logs. P-256 and not Ed25519, because gRPC's TLS library does not
accept Ed25519 certificates.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medfl.common.errors import PolicyRefused, StorageError
from medfl.common.private_files import read_private, write_private

TlsKey = ec.EllipticCurvePrivateKey
Certificate = x509.Certificate

WARN_BEFORE_S = 14 * 86400.0

_USES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
# A hospital's clock may be behind ours; a new certificate must serve at once.
_BACKDATED = dt.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a certificate is to say. seconds: valid so long from `now` (seconds since 1970)."""

    name: str
    now: float
    seconds: float
    use: str = ""  # "server", "client", or "" for an authority
    dns: tuple[str, ...] = ()


def new_tls_key() -> TlsKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def issue(
    wanted: Wanted, public: ec.EllipticCurvePublicKey, issuer: str, key: TlsKey
) -> Certificate:
    """Sign a certificate for `public` as `issuer` with the issuer's key."""
    start = dt.datetime.fromtimestamp(wanted.now, dt.UTC)
    is_authority = not wanted.use
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(wanted.name))
        .issuer_name(_named(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(start + dt.timedelta(seconds=wanted.seconds))
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), True)
    )
    if wanted.use:
        uses = {
            "server": ExtendedKeyUsageOID.SERVER_AUTH,
            "client": ExtendedKeyUsageOID.CLIENT_AUTH,
        }
        builder = builder.add_extension(x509.ExtendedKeyUsage([uses[wanted.use]]), True)
    if wanted.dns:
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in wanted.dns])
        builder = builder.add_extension(names, False)
    return builder.sign(key, hashes.SHA256())


def request(name: str, key: TlsKey) -> str:
    """A certificate signing request as PEM; the key stays where it is."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_named(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def requested(pem: str) -> tuple[str, ec.EllipticCurvePublicKey]:
    """(name, public key) of a request. Raises PolicyRefused where it is not sound."""
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        public = csr.public_key()
        if (
            isinstance(public, ec.EllipticCurvePublicKey)
            and isinstance(public.curve, ec.SECP256R1)
            and csr.is_signature_valid
        ):
            return common_name(csr.subject), public
    except (ValueError, TypeError):
        pass
    raise PolicyRefused("The certificate request is not a sound P-256 request of medfl-client.")


def common_name(name: x509.Name) -> str:
    """The one common name of a subject or issuer, "" where there is none."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def was_issued_by(certificate: Certificate, authority: Certificate) -> bool:
    """Whether `authority` signed it (names and signature; validity is another question)."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def digest_of(certificate: Certificate) -> str:
    """SHA-256 over the DER form, as hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def public_digest(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 over the public key's DER form, as hex."""
    sha = hashes.Hash(hashes.SHA256())
    sha.update(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return sha.finalize().hex()


def ends_at(certificate: Certificate) -> float:
    """Seconds since 1970 at which it expires."""
    return certificate.not_valid_after_utc.timestamp()


def ending(certificate: Certificate, whose: str, now: float, what_to_do: str) -> str:
    """What to say of a certificate in its last two weeks, "" before."""
    left_s = ends_at(certificate) - now
    if left_s > WARN_BEFORE_S:
        return ""
    return f"{whose} ends in {left_s / 86400:.0f} days. {what_to_do}"


def life_of(certificate: Certificate) -> float:
    """Seconds from its beginning to its end."""
    return (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()


def pem_of(certificate: Certificate) -> str:
    """As PEM text."""
    return certificate.public_bytes(Encoding.PEM).decode()


def der_of(certificate: Certificate) -> bytes:
    """As DER bytes."""
    return certificate.public_bytes(Encoding.DER)


def key_pem(key: TlsKey) -> bytes:
    """The private key as unencrypted PEM; the file's mode protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_certificate(content: bytes, where: str) -> Certificate:
    """Read PEM or DER; `where` names it in the message. Raises StorageError."""
    try:
        if content.lstrip().startswith(b"-----"):
            return x509.load_pem_x509_certificate(content)
        return x509.load_der_x509_certificate(content)
    except ValueError:
        raise StorageError(f"{where}: is not a certificate; restore it from the backup") from None


def load_tls_key(content: bytes, where: str) -> TlsKey:
    """Read a P-256 key from PEM; `where` names it in the message. Raises StorageError."""
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StorageError(f"{where}: is not a whole P-256 key; restore it from the backup")
    return key


def save_pair(path: Path, key: TlsKey, certificate: Certificate) -> None:
    """Key and certificate in one file, so that they change together. Raises StorageError."""
    write_private(path, key_pem(key) + pem_of(certificate).encode())


def load_pair(path: Path) -> tuple[TlsKey, Certificate]:
    """Inverse of `save_pair`. Raises ConfigError, StorageError."""
    content = read_private(path)
    return load_tls_key(content, str(path)), load_certificate(content, str(path))


def server_name(authority: Certificate) -> str:
    """The one name of a federation's gateway, whatever address leads there.

    Made from the authority's key, so that a reverse proxy can tell federations apart by it and a
    changed address or a port forwarding needs no new certificate.
    """
    public = authority.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise StorageError("The authority's certificate has no P-256 key; restore it.")
    return f"fed-{public_digest(public)[:16]}.medfl.internal"


def _named(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
