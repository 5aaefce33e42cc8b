"""Joining a federation: keys are made here and stay here, and the coordinator's are pinned."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from medfl.client.coordinator import HungUp, Line, connected, skew_warning
from medfl.client.hatch import is_hatch, line_through
from medfl.client.premises import Enrolment, Home
from medfl.common import certificates, invitation
from medfl.common.certificates import Certificate, TlsKey
from medfl.common.coordination import Enrol, Enrolled, Hello, Renew, Welcome
from medfl.common.errors import ConfigError, FederationError, PolicyRefused
from medfl.common.invitation import Token
from medfl.common.kept import save_record
from medfl.common.private_files import locked, private_folder, read_private, write_private
from medfl.common.signing import SigningKey, fingerprint, load_key, new_key, public_of, sign

log = logging.getLogger(__name__)

PROOF = "enrolment"
DAY_S = 86400.0
# With 90 days, a site that is off for a month still renews in time.
RENEW_AT = 1 / 3


def enrol(home: Home, address: str, token: Token) -> Enrolment:
    """Get a certificate for keys made here; where that is done already, change nothing.

    Interrupted anywhere, the same command again goes on with the same keys.

    Raises:
        ConfigError: this folder belongs to another site or federation.
        PolicyRefused: the token is used, expired, cancelled or unknown.
        FederationError: the coordinator cannot be reached, or its answer is not sound.
    """
    _refuse_bad_address(address)
    authority = invitation.authority_of(token)
    private_folder(home.folder)
    with locked(home.folder / "enrolment.lock"):
        if home.enrolment_file.exists():
            return _the_same(home, token, authority)
        key, signing = _pending_key(home), _signing_key(home)
        answer = _ask(home, address, token, key, signing)
        certificate = _checked(answer, token, authority, key)
        if warning := skew_warning(home.clock(), answer.now):
            log.warning("%s", warning)
        write_private(home.authority_file, certificates.pem_of(authority).encode())
        certificates.save_pair(home.identity_file, key, certificate)
        made = Enrolment(
            site=token.site,
            address=address,
            federation=answer.federation,
            coordinator_key=answer.coordinator_key,
            enrolled=int(home.clock()),
        )
        home.record(
            "enrolled",
            site=token.site,
            certificate=certificates.digest_of(certificate),
            authority=certificates.digest_of(authority),
            coordinator_key=answer.coordinator_key,
        )
        # Last: this file says that the rest is whole.
        save_record(home.enrolment_file, made)
        (home.folder / "identity.new").unlink(missing_ok=True)
        return made


def authority_fingerprint(home: Home) -> str:
    """To be compared with what the coordinator reads out."""
    return fingerprint(certificates.der_of(home.authority()))


@contextmanager
def line_to(home: Home, address: str | None = None) -> Iterator[Line]:
    """A line with this site's certificate, which is renewed first where it is due.

    In a divided hospital certificate and line are the network side's.

    Raises:
        PolicyRefused: the certificate has expired, or the coordinator refuses it.
    """
    enrolment = home.enrolment()
    if is_hatch(enrolment.address):
        with line_through(enrolment.address) as line:
            yield line
        return
    renew_if_due(home, address or enrolment.address)
    key, certificate = home.identity()
    with connected(address or enrolment.address, home.authority(), key, certificate) as line:
        yield line


def renew_if_due(home: Home, address: str) -> bool:
    """Fetch the next certificate where the present one ends soon; True where it was done.

    An unreachable coordinator is no error while the present certificate holds.
    """
    if is_hatch(address):
        return False
    key, certificate = home.identity()
    left = certificates.ends_at(certificate) - home.clock()
    if left <= 0:
        raise PolicyRefused(
            "This site's certificate has expired. Ask the coordinator for a new invitation "
            "(medfl-server invite NAME --again) and enrol in a new folder."
        )
    if left > RENEW_AT * certificates.life_of(certificate):
        return False
    try:
        with connected(address, home.authority(), key, certificate) as line:
            renew(home, line)
        return True
    except FederationError as error:
        level = logging.WARNING if left < certificates.WARN_BEFORE_S else logging.INFO
        log.log(level, "the certificate ends in %.0f days: %s", left / DAY_S, error)
        return False


def ending(home: Home) -> list[str]:
    """What to say of certificates that end within two weeks; the network side has its own."""
    if is_hatch(home.enrolment().address):
        return []
    said = (
        certificates.ending(
            home.identity()[1],
            "This site's certificate",
            home.clock(),
            "It renews itself while medfl-client runs and reaches the coordinator; leave it on.",
        ),
        certificates.ending(
            home.authority(),
            "The federation's authority",
            home.clock(),
            "Ask the coordinator for a new federation.",
        ),
    )
    return [text for text in said if text]


def renew(home: Home, line: Line) -> None:
    """Replace key and certificate by new ones, in one step."""
    site = home.enrolment().site
    with locked(home.folder / "enrolment.lock"):
        key = certificates.new_tls_key()
        answer = line.call("Renew", Renew(certificates.request(site, key)), Enrolled)
        certificate = _sound(answer, site, home.authority(), key)
        home.record("renewed", certificate=certificates.digest_of(certificate))
        certificates.save_pair(home.identity_file, key, certificate)


def greet(home: Home, line: Line, session: str, version: str) -> Welcome:
    """Begin this process's session; new sites' keys are pinned, changed ones refused.

    Raises:
        PolicyRefused: another process of this site is live, or a pinned key has changed.
        FederationError: the clocks are too far apart.
    """
    welcome = line.call("Hello", Hello(session=session, version=version), Welcome)
    if warning := skew_warning(home.clock(), welcome.now):
        raise FederationError(warning)
    pin_sites(home, welcome.sites)
    return welcome


def pin_sites(home: Home, shown: dict[str, str]) -> None:
    """Keep the keys of sites that are new here. Raises PolicyRefused where one has changed."""
    known = home.enrolment()
    changed = sorted(s for s, key in shown.items() if known.sites.get(s, key) != key)
    if changed:
        home.record("key of a site changed", site=changed[0])
        raise PolicyRefused(
            f"The signing key of {', '.join(changed)} is not the one that was pinned. If the site "
            "enrolled again, accept it with: medfl-client accept-key SITE"
        )
    new = {site: key for site, key in shown.items() if site not in known.sites}
    if new:
        for site, key in sorted(new.items()):
            home.record("pinned", site=site, key=key)
        save_record(home.enrolment_file, replace(known, sites=known.sites | new))


def forget_site(home: Home, site: str) -> None:
    """Drop the pinned key of another site, so that its next one is pinned. Raises ConfigError."""
    known = home.enrolment()
    if site not in known.sites:
        raise ConfigError(f"{site}: no key of such a site is pinned here")
    home.record("unpinned", site=site, key=known.sites[site])
    left = {name: key for name, key in known.sites.items() if name != site}
    save_record(home.enrolment_file, replace(known, sites=left))


def _the_same(home: Home, token: Token, authority: Certificate) -> Enrolment:
    known = home.enrolment()
    same = certificates.digest_of(home.authority()) == certificates.digest_of(authority)
    if known.site != token.site or not same:
        raise ConfigError(
            f"{home.folder}: is enrolled already, as {known.site} of {known.federation}. Name "
            "another folder with --state."
        )
    return known


def _pending_key(home: Home) -> TlsKey:
    """The key of an enrolment that was begun, or a new one."""
    file = home.folder / "identity.new"
    if not file.exists():
        write_private(file, certificates.key_pem(certificates.new_tls_key()))
    return certificates.load_tls_key(read_private(file), str(file))


def _signing_key(home: Home) -> SigningKey:
    file = home.signing_file
    return load_key(file) if file.exists() else new_key(file)


def _ask(home: Home, address: str, token: Token, key: TlsKey, signing: SigningKey) -> Enrolled:
    request = certificates.request(token.site, key)
    asked = Enrol(
        site=token.site,
        request=request,
        signing_key=public_of(signing),
        proof=sign(signing, PROOF, {"request": request, "site": token.site}),
    )
    guest_key, guest = invitation.guest_certificate(token, home.clock())
    try:
        with connected(address, invitation.authority_of(token), guest_key, guest) as line:
            return line.call("Enrol", asked, Enrolled)
    except HungUp:
        # A token that serves no more does not get past the handshake.
        raise PolicyRefused(
            f"The coordinator at {address} does not take this token: it was used, has expired or "
            "was cancelled. Ask the coordinator for a new one. If this one is new, compare the "
            "clocks, and the address with the one in the invitation."
        ) from None


def _checked(answer: Enrolled, token: Token, authority: Certificate, key: TlsKey) -> Certificate:
    if len(answer.coordinator_key) != 64 or not answer.federation:
        raise FederationError("The coordinator's answer lacks its key or name.")
    return _sound(answer, token.site, authority, key)


def _sound(answer: Enrolled, site: str, authority: Certificate, key: TlsKey) -> Certificate:
    """The certificate, if it is what was asked for. Raises FederationError."""
    made = certificates.load_certificate(answer.certificate.encode(), "the answer")
    if (
        not certificates.was_issued_by(made, authority)
        or made.public_key() != key.public_key()
        or certificates.common_name(made.subject) != site
    ):
        raise FederationError(
            "The coordinator's answer is not a certificate for this site's key. Nothing was kept."
        )
    return made


def _refuse_bad_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in address:
        raise ConfigError(f"{address}: write host and port, like coordinator.example:443")
