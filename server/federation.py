"""The coordinator's folder: settings, keys, who takes part, and the log of what was done.

server.toml         settings that a person may edit
keys/               authority, gateway, coordinator: 0600
state/sites         one record a site            state/invitations   one record a token
state/studies       what was published           state/decisions     <study>/<site>.json
state/reports       what sites last said         state/heads         last audit head a site
audit.jsonl         the chain; witnesses.jsonl holds the sites' signatures under it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from medfl.common import certificates
from medfl.common.audit import AuditLog
from medfl.common.certificates import Certificate, TlsKey
from medfl.common.errors import ConfigError
from medfl.common.kept import load_record, load_records
from medfl.common.private_files import locked
from medfl.common.signing import SigningKey, load_key

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One enrolled hospital.

    certificate: SHA-256 of the one that speaks for it; previous: of the one before, accepted until
    `previous_until` so that a renewal whose answer was lost can be repeated. ends: its expiry.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: str
    status: Literal["active", "revoked"]
    certificate: str
    ends: float
    signing_key: str
    enrolled: int
    previous: str = ""
    previous_until: float = 0.0
    revoked_because: str = ""


@dataclass(frozen=True, slots=True)
class Invitation:
    """One token, of which only the public half is kept.

    anchor: PEM; what the guest's certificate must be signed by. request: digest of the public key
    that used the token, "" while nobody has. certificate: the PEM that it was given. used: when.
    replayed: another key has tried it since.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    identity: str
    site: str
    expires: float
    anchor: str
    request: str = ""
    certificate: str = ""
    cancelled: bool = False
    used: float = 0.0
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Federation:
    """A folder that `medfl-server init` has made. clock: seconds since 1970."""

    folder: Path
    name: str
    clock: Callable[[], float] = time.time

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def audit(self) -> AuditLog:
        return AuditLog(self.folder / "audit.jsonl")

    @property
    def witnesses(self) -> Path:
        """Sites' signatures under heads of our log."""
        return self.folder / "witnesses.jsonl"

    @property
    def title(self) -> str:
        """The coordinator's name as a witness; no site's name has a colon."""
        return f"coordinator:{self.name}"

    def authority(self) -> tuple[TlsKey, Certificate]:
        """The key and certificate that sign all others."""
        return self._pair("authority")

    def gateway(self) -> tuple[TlsKey, Certificate]:
        """The key and certificate that the gateway shows."""
        return self._pair("gateway")

    def signing_key(self) -> SigningKey:
        """What the coordinator signs studies, heads and instructions with."""
        return load_key(self.keys / "coordinator.key")

    def site(self, name: str) -> SiteRecord | None:
        """The record of a site, as it is on disk now."""
        return load_record(self.state / "sites" / f"{name}.json", SiteRecord)

    def sites(self) -> list[SiteRecord]:
        """All sites by name, revoked ones included."""
        return load_records(self.state / "sites", SiteRecord)

    def invitations(self) -> list[Invitation]:
        """All invitations, used and expired ones included."""
        return load_records(self.state / "invitations", Invitation)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Alone with the state while it is changed; commands and the gateway take turns."""
        with locked(self.state / "lock"):
            yield

    def record(self, what: str, **about: str | int | float | list[str]) -> None:
        """One line of the audit log."""
        self.audit.append(what, about, self.clock())

    def _pair(self, name: str) -> tuple[TlsKey, Certificate]:
        return certificates.load_pair(self.keys / f"{name}.pem")


def known_name(name: str) -> str:
    """A site's name in the one form that files and certificates take. Raises ConfigError."""
    if not is_name(name):
        raise ConfigError(
            f"{name!r}: is no site name; use up to 63 lower-case letters, digits, - and _, "
            "beginning with a letter or digit"
        )
    return name


def is_name(name: str) -> bool:
    """Whether this could be a site's name; what is none must never become part of a path."""
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    return 0 < len(name) <= 63 and not set(name) - allowed and name[0] not in "-_"
