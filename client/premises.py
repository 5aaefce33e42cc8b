"""The hospital's state folder (0700): keys, pins, approvals and the audit log.

enrolment.json   where the coordinator is and whose keys are pinned
authority.pem    the federation's authority          identity.pem  TLS key and certificate
signing.key      Ed25519: approvals, updates, heads  studies/      as the coordinator published them
decisions/       this site's signed word, by study   audit.jsonl   the chain
witnesses.jsonl  the coordinator's signatures under it
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from medfl.common import certificates
from medfl.common.approvals import Decision
from medfl.common.audit import AuditLog
from medfl.common.certificates import Certificate, TlsKey
from medfl.common.coordination import Published
from medfl.common.errors import ConfigError
from medfl.common.kept import load_record, load_records
from medfl.common.private_files import private_folder, read_private
from medfl.common.signing import SigningKey, load_key

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Enrolment:
    """address: host:port of the gateway. coordinator_key: public, hex. sites: others' keys."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    site: str
    address: str
    federation: str
    coordinator_key: str
    enrolled: int
    sites: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Home:
    """The state folder. clock: seconds since 1970."""

    folder: Path
    clock: Callable[[], float] = time.time

    @property
    def enrolment_file(self) -> Path:
        return self.folder / "enrolment.json"

    @property
    def identity_file(self) -> Path:
        return self.folder / "identity.pem"

    @property
    def signing_file(self) -> Path:
        return self.folder / "signing.key"

    @property
    def authority_file(self) -> Path:
        return self.folder / "authority.pem"

    @property
    def witnesses(self) -> Path:
        """The coordinator's signatures under heads of our log."""
        return self.folder / "witnesses.jsonl"

    @property
    def audit(self) -> AuditLog:
        return AuditLog(self.folder / "audit.jsonl")

    def enrolment(self) -> Enrolment:
        """Who this hospital is. Raises ConfigError where it is not enrolled."""
        if self.folder.exists():
            private_folder(self.folder)
        found = load_record(self.enrolment_file, Enrolment)
        if found is None:
            raise ConfigError(
                f"{self.folder}: this hospital is not enrolled here. Run: medfl-client enrol "
                "HOST:PORT --token ..., or name another folder with --state or MEDFL_STATE"
            )
        return found

    def identity(self) -> tuple[TlsKey, Certificate]:
        """TLS key and certificate."""
        return certificates.load_pair(self.identity_file)

    def authority(self) -> Certificate:
        """The authority that was pinned at enrolment."""
        file = self.authority_file
        return certificates.load_certificate(read_private(file), str(file))

    def signing_key(self) -> SigningKey:
        """What this hospital signs with."""
        return load_key(self.signing_file)

    def published(self) -> list[Published]:
        """Studies as last heard from the coordinator, newest first."""
        found = load_records(self.folder / "studies", Published)
        return sorted(found, key=lambda p: (-p.at, p.digest))

    def decision(self, study: str) -> Decision | None:
        """This site's last word on a study (digest)."""
        return load_record(self.decision_file(study), Decision)

    def decision_file(self, study: str) -> Path:
        """Where the word on a study lies; raises ConfigError for what is no digest."""
        if len(study) != 64 or set(study) - set("0123456789abcdef"):
            raise ConfigError("A study's digest has 64 hexadecimal digits.")
        return self.folder / "decisions" / f"{study}.json"

    def record(self, what: str, **about: str | int | float) -> None:
        """One line of the audit log."""
        self.audit.append(what, about, self.clock())
