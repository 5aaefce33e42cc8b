"""What hospital and coordinator say to each other beside the training: JSON over gRPC.

Every message is a flat frozen dataclass; a body is refused unless it has exactly its fields.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from medfl.common.approvals import Decision
from medfl.common.config import decoded
from medfl.common.errors import FederationError
from medfl.common.heads import Witness
from medfl.common.signing import canonical

SERVICE = "medfl.Coordinator"
MAX_BODY = 1024 * 1024
# A site that is not heard for so long may start again elsewhere.
LEASE_S = 20.0

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Enrol:
    """A guest asks for a certificate.

    site: the invited name. request: PEM. signing_key: public, hex. proof: the signing key's
    signature over the request, so that nobody pins a key that he does not hold.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    site: str
    request: str
    signing_key: str
    proof: str


@dataclass(frozen=True, slots=True)
class Enrolled:
    """certificate: PEM. coordinator_key: public, hex; the site pins it. now: the server's clock."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    certificate: str
    coordinator_key: str
    federation: str
    now: float


@dataclass(frozen=True, slots=True)
class Renew:
    """A site asks for its next certificate over its present one."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    request: str


@dataclass(frozen=True, slots=True)
class Hello:
    """A site's process begins its session. session: random text of its own."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    session: str
    version: str


@dataclass(frozen=True, slots=True)
class Bye:
    """The session ends, so that the site can start elsewhere at once."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    session: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """now: the server's clock. certificate_ends: of the caller's certificate.

    sites: signing keys of the other sites by name, to be pinned where they are new.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    now: float
    federation: str
    version: str
    certificate_ends: float
    sites: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AskStudies:
    """Which studies are published?"""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True, slots=True)
class Published:
    """A study as the coordinator publishes it.

    study: plain JSON form. digest: of the study. at: seconds since 1970. signature: the
    coordinator's, over everything else.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: str
    digest: str
    study: str
    at: int
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Studies:
    """All published studies, newest first. now: the server's clock.

    sites: signing keys of the other sites by name; whoever approves a secure sum approves these.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    now: float
    published: tuple[Published, ...] = ()
    sites: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decide:
    """A site's signed decision, to be kept by the coordinator."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    decision: Decision


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing more to say."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    now: float


@dataclass(frozen=True, slots=True)
class Heard:
    """The answer to a report.

    lines: of the coordinator's audit log; fewer than it has shown before, and it was put back.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    now: float
    lines: int


@dataclass(frozen=True, slots=True)
class ShowHead:
    """own: the site's signed head. seen: the site's signature under the coordinator's last.

    ledger: its privacy ledger's (`medfl.common.heads.ledger_of`); None where it has none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    own: Witness
    seen: Witness | None = None
    ledger: Witness | None = None


@dataclass(frozen=True, slots=True)
class HeadSeen:
    """own: the coordinator's signed head. seen, ledger: its signatures under the site's.

    then: its signed word of the line that it showed the site last, as its log has it now.
    knew: the site's head before, as the site signed it: a site whose log was put back sees it here.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    own: Witness
    seen: Witness
    ledger: Witness | None = None
    then: Witness | None = None
    knew: Witness | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a site says of itself every few seconds: a word, and a round where it is in one."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    session: str
    state: Annotated[str, Field(max_length=100)]
    study: Annotated[str, Field(max_length=100)] = ""
    round: int = 0


METHODS: dict[str, tuple[type, type]] = {
    "Enrol": (Enrol, Enrolled),
    "Renew": (Renew, Enrolled),
    "Hello": (Hello, Welcome),
    "Bye": (Bye, Done),
    "Studies": (AskStudies, Studies),
    "Decide": (Decide, Done),
    "Heads": (ShowHead, HeadSeen),
    "Report": (Report, Heard),
}

M = TypeVar("M")


def encode(message: Any) -> bytes:
    """A message as canonical JSON."""
    return canonical(asdict(message))


def decode(body: bytes, kind: type[M]) -> M:
    """Inverse of `encode`. Raises FederationError for anything else, without repeating it."""
    try:
        if len(body) <= MAX_BODY:
            return decoded(body, kind)
    except (ValueError, ValidationError, RecursionError):
        pass
    raise FederationError(
        f"A message does not have the fields of {kind.__name__}. Coordinator and hospitals must "
        "run the same version of medfl; compare `--version` on both."
    )
