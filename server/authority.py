"""Who belongs to the federation: its authority, invitations, enrolment, renewal, revocation.

Every function that changes something writes the audit log first and the state after, both under
the folder's lock, so that nothing is done that the log does not hold.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from medfl.common import certificates, invitation
from medfl.common.certificates import Certificate, Wanted
from medfl.common.coordination import Enrol, Enrolled
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.invitation import Token
from medfl.common.kept import load_record, save_record
from medfl.common.private_files import private_folder, write_private
from medfl.common.signing import fingerprint, is_signed, new_key, public_of
from medfl.server.federation import Federation, Invitation, SiteRecord, is_name, known_name
from medfl.server.settings import ServerSettings, settings_text

log = logging.getLogger(__name__)

DAY_S = 86400.0
AUTHORITY_DAYS = 3650
PROOF = "enrolment"
# A renewed site may have missed the answer; the certificate it asked with serves that long.
_GRACE_S = DAY_S
# A used token opens the door that much longer, because the answer may have been lost on its way.
_LOST_ANSWER_S = 900.0


@dataclass(frozen=True, slots=True)
class Guest:
    """Somebody who holds the token of this invitation."""

    invitation: Invitation


def init(folder: Path, settings: ServerSettings, now: float) -> Federation:
    """Make a federation's folder; on one that is made already, change nothing.

    Raises:
        ConfigError: the folder holds another federation, or something else.
    """
    federation = Federation(folder, settings.name, lambda: now)
    if (folder / "server.toml").exists():
        return federation
    if folder.exists() and any(folder.iterdir()) and not (folder / "keys").is_dir():
        raise ConfigError(f"{folder}: is not empty; name a new folder")
    for place in (folder, federation.keys, federation.state):
        private_folder(place)
    _make_authority(federation, settings, now)
    if not (federation.keys / "coordinator.key").exists():
        new_key(federation.keys / "coordinator.key")
    renew_gateway(federation, settings)
    federation.record("initialised", federation=settings.name)
    # Last: the settings file says that the folder is whole.
    write_private(folder / "server.toml", settings_text(settings).encode())
    return federation


def _make_authority(federation: Federation, settings: ServerSettings, now: float) -> None:
    place = federation.keys / "authority.pem"
    if place.exists():
        return
    key, name = certificates.new_tls_key(), f"medfl {secrets.token_hex(4)}"
    wanted = Wanted(name, now, AUTHORITY_DAYS * DAY_S)
    made = certificates.issue(wanted, key.public_key(), name, key)
    certificates.save_pair(place, key, made)


def renew_gateway(federation: Federation, settings: ServerSettings) -> Certificate:
    """A new key and certificate for the gateway; a running one takes them up at the next call."""
    key, authority = federation.authority()
    own = certificates.new_tls_key()
    wanted = Wanted(
        "gateway",
        federation.clock(),
        settings.certificate_days * DAY_S,
        use="server",
        dns=(certificates.server_name(authority),),
    )
    issuer = certificates.common_name(authority.subject)
    made = certificates.issue(wanted, own.public_key(), issuer, key)
    certificates.save_pair(federation.keys / "gateway.pem", own, made)
    return made


def invite(federation: Federation, site: str, hours: float, *, again: bool = False) -> Token:
    """A token for one site; an unused earlier one of the same site is cancelled.

    Raises:
        ConfigError: the name is none, or the site is enrolled and `again` is not said.
    """
    known_name(site)
    with federation.change():
        now = federation.clock()
        record = federation.site(site)
        if record is not None and record.status == "active" and not again:
            raise ConfigError(
                f"{site}: is enrolled already. If it has lost its keys, say --again: the new "
                "enrolment replaces the old one."
            )
        _, authority = federation.authority()
        token = invitation.new_token(site, authority)
        anchor = invitation.anchor(token, now, hours * 3600 + _LOST_ANSWER_S)
        made = Invitation(
            identity=invitation.identity_of(token),
            site=site,
            expires=now + hours * 3600,
            anchor=certificates.pem_of(anchor),
        )
        federation.record("invited", site=site, invitation=made.identity, hours=hours)
        for old in federation.invitations():
            if old.site == site and not old.request and not old.cancelled:
                _save_invitation(federation, replace(old, cancelled=True))
        _save_invitation(federation, made)
        return token


def cancel_open(federation: Federation) -> None:
    """Cancel invitations that nobody has used, as far as this state knows."""
    with federation.change():
        for known in federation.invitations():
            if not known.request and not known.cancelled:
                federation.record("invitation cancelled", site=known.site)
                _save_invitation(federation, replace(known, cancelled=True))


def anchors(federation: Federation) -> list[Invitation]:
    """Invitations whose holders may still knock: others do not get past the handshake."""
    now = federation.clock()
    return [i for i in federation.invitations() if not i.cancelled and now < _closes(i)]


def _closes(known: Invitation) -> float:
    return known.used + _LOST_ANSWER_S if known.request else known.expires


def identify(federation: Federation, peer_pem: bytes) -> SiteRecord | Guest:
    """Who shows this certificate, by the state on disk at this moment.

    A site's record names the certificate that was shown, which may be the one before its newest.

    Raises:
        PolicyRefused: nobody that this federation knows, or knows no more.
    """
    shown = certificates.load_certificate(peer_pem, "peer")
    issuer = certificates.common_name(shown.issuer)
    identity = issuer.removeprefix(invitation.anchor_name(""))
    if issuer == invitation.anchor_name(identity):
        for known in anchors(federation):
            anchor = certificates.load_certificate(known.anchor.encode(), "invitation")
            if known.identity == identity and certificates.was_issued_by(shown, anchor):
                return Guest(known)
        raise PolicyRefused(
            "This token is not known here: it was used, has expired or was cancelled. Ask the "
            "coordinator for a new one."
        )
    return _site_of(federation, shown)


def _site_of(federation: Federation, shown: Certificate) -> SiteRecord:
    name, digest = certificates.common_name(shown.subject), certificates.digest_of(shown)
    now = federation.clock()
    record = federation.site(name) if is_name(name) else None
    if record is None:
        raise PolicyRefused("This certificate belongs to no site of this federation.")
    if record.status == "revoked":
        raise PolicyRefused(f"The site {name} was revoked. Ask the coordinator why.")
    is_previous = digest == record.previous and now < record.previous_until
    if digest != record.certificate and not is_previous:
        raise PolicyRefused(
            f"This certificate of {name} has been replaced by a newer one. If that was not you, "
            "tell the coordinator at once."
        )
    if now >= certificates.ends_at(shown):
        raise PolicyRefused(
            f"The certificate of {name} has expired. Ask the coordinator for a new invitation."
        )
    return replace(record, certificate=digest, ends=certificates.ends_at(shown))


def enrol(federation: Federation, guest: Guest, asked: Enrol, days: float) -> Enrolled:
    """Sign a guest's request and pin its signing key; the token is spent.

    The same request again gets the same certificate: its answer may have been lost on the way.

    Raises:
        PolicyRefused: the token is spent, expired, cancelled or another site's; or the request
            is not sound.
    """
    with federation.change():
        known = _fresh(federation, guest)
        name, public = certificates.requested(asked.request)
        if name != known.site or asked.site != known.site:
            raise PolicyRefused("This token was made for another site.")
        plain = {"request": asked.request, "site": asked.site}
        if not is_signed(asked.signing_key, PROOF, plain, asked.proof):
            raise PolicyRefused("The request is not signed by the signing key that it brings.")
        request = certificates.public_digest(public)
        if known.request and known.request != request:
            if not known.replayed:  # one line, however often
                federation.record("token replayed", site=known.site, invitation=known.identity)
                _save_invitation(federation, replace(known, replayed=True))
            raise PolicyRefused("This token has been used. Ask the coordinator for a new one.")
        if not known.request:
            known = _admit(federation, known, asked, days)
        return Enrolled(
            certificate=known.certificate,
            coordinator_key=public_of(federation.signing_key()),
            federation=federation.name,
            now=federation.clock(),
        )


def _fresh(federation: Federation, guest: Guest) -> Invitation:
    """The invitation as it is on disk now, if it still invites."""
    known = load_record(_invitation_file(federation, guest.invitation.identity), Invitation)
    if known is None or known.cancelled:
        raise PolicyRefused("This token was cancelled; a newer one was made.")
    if federation.clock() >= _closes(known):
        raise PolicyRefused("This token has expired. Ask the coordinator for a new one.")
    return known


def _admit(federation: Federation, known: Invitation, asked: Enrol, days: float) -> Invitation:
    _, public = certificates.requested(asked.request)
    made = _issue(federation, known.site, asked.request, days)
    federation.record(
        "enrolled",
        site=known.site,
        certificate=certificates.digest_of(made),
        signing_key=asked.signing_key,
        invitation=known.identity,
    )
    record = SiteRecord(
        name=known.site,
        status="active",
        certificate=certificates.digest_of(made),
        ends=certificates.ends_at(made),
        signing_key=asked.signing_key,
        enrolled=int(federation.clock()),
    )
    _save_site(federation, record)
    spent = replace(
        known,
        request=certificates.public_digest(public),
        certificate=certificates.pem_of(made),
        used=federation.clock(),
    )
    _save_invitation(federation, spent)
    return spent


def renew(federation: Federation, caller: SiteRecord, request: str, days: float) -> Enrolled:
    """The site's next certificate; the one it asks with serves one more day.

    caller: as `identify` says it.

    Raises:
        PolicyRefused: the site is not active, or the request is not sound or names another.
    """
    with federation.change():
        site, record = caller.name, federation.site(caller.name)
        if record is None or record.status != "active":
            raise PolicyRefused(f"The site {site} is not active.")
        if certificates.requested(request)[0] != site:
            raise PolicyRefused("The request names another site than the certificate.")
        made = _issue(federation, site, request, days)
        federation.record("renewed", site=site, certificate=certificates.digest_of(made))
        renewed = replace(
            record,
            certificate=certificates.digest_of(made),
            ends=certificates.ends_at(made),
            previous=caller.certificate,
            previous_until=min(caller.ends, federation.clock() + _GRACE_S),
        )
        _save_site(federation, renewed)
        return Enrolled(
            certificate=certificates.pem_of(made),
            coordinator_key=public_of(federation.signing_key()),
            federation=federation.name,
            now=federation.clock(),
        )


def revoke(federation: Federation, site: str, why: str) -> bool:
    """Shut a site out; its next call is refused. False where it was revoked before.

    Raises:
        ConfigError: there is no such site.
    """
    with federation.change():
        record = federation.site(known_name(site))
        if record is None:
            raise ConfigError(f"{site}: is not enrolled; `medfl-server sites` lists who is")
        if record.status == "revoked":
            return False
        federation.record("revoked", site=site, why=why)
        _save_site(federation, replace(record, status="revoked", revoked_because=why))
        return True


def authority_fingerprint(federation: Federation) -> str:
    """What both sides read out to each other."""
    return fingerprint(certificates.der_of(federation.authority()[1]))


def ending(federation: Federation) -> list[str]:
    """What to say of the coordinator's own certificates that end within two weeks."""
    now = federation.clock()
    said = (
        certificates.ending(
            federation.gateway()[1],
            "The gateway's certificate",
            now,
            "A running server renews it; else: medfl-server renew",
        ),
        certificates.ending(
            federation.authority()[1],
            "The federation's authority",
            now,
            "Plan a new federation: `medfl-server init`, and invite the sites again.",
        ),
    )
    return [text for text in said if text]


def _issue(federation: Federation, site: str, request: str, days: float) -> Certificate:
    key, authority = federation.authority()
    _, public = certificates.requested(request)
    wanted = Wanted(site, federation.clock(), days * DAY_S, use="client")
    return certificates.issue(wanted, public, certificates.common_name(authority.subject), key)


def _save_site(federation: Federation, record: SiteRecord) -> None:
    save_record(federation.state / "sites" / f"{record.name}.json", record)


def _save_invitation(federation: Federation, made: Invitation) -> None:
    save_record(_invitation_file(federation, made.identity), made)


def _invitation_file(federation: Federation, identity: str) -> Path:
    return federation.state / "invitations" / f"{identity}.json"
