"""The hospital's calls to the coordinator: one outbound connection, TLS 1.3, both sides known."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from medfl.common import certificates, coordination
from medfl.common.certificates import Certificate, TlsKey
from medfl.common.coordination import METHODS, SERVICE
from medfl.common.errors import FederationError, MedflError, PolicyRefused
from medfl.common.tunnel import GRPC_OPTIONS

log = logging.getLogger(__name__)

CALL_S = 15.0
# Beyond this, expiries and approvals would be judged wrongly.
MAX_SKEW_S = 300.0

T = TypeVar("T")


class HungUp(FederationError):
    """Something answered at the address, and closed the line before a word was said."""


@dataclass(frozen=True, slots=True)
class Line:
    """An open channel to the coordinator at `address`; also what the tunnel is built on."""

    address: str
    channel: grpc.Channel

    def call(self, method: str, message: Any, answer: type[T]) -> T:
        """One exchange of `medfl.common.coordination.METHODS`.

        Raises:
            PolicyRefused: the coordinator refuses this site, or this request of it.
            FederationError: it cannot be reached, or does not understand.
        """
        asked, given = METHODS[method]
        if not isinstance(message, asked) or answer is not given:
            raise TypeError(f"{method} takes {asked.__name__} and gives {given.__name__}")
        send = self.channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            body = send(coordination.encode(message), timeout=CALL_S)
        except grpc.RpcError as error:
            raise translated(error, self.address) from None
        return coordination.decode(body, answer)


@contextmanager
def connected(
    address: str, authority: Certificate, key: TlsKey, certificate: Certificate
) -> Iterator[Line]:
    """A line on which this certificate speaks; the server must be `authority`'s gateway.

    A proxy is taken from the environment (`https_proxy`, `no_proxy`), as gRPC does.
    """
    credentials = grpc.ssl_channel_credentials(
        certificates.pem_of(authority).encode(),
        certificates.key_pem(key),
        certificates.pem_of(certificate).encode(),
    )
    options = [
        ("grpc.ssl_target_name_override", certificates.server_name(authority)),
        # Channels of one process share connections otherwise, also those of another certificate.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_reconnect_backoff_ms", 15_000),
        *GRPC_OPTIONS,
    ]
    with grpc.secure_channel(address, credentials, options) as channel:
        yield Line(address, channel)


def translated(error: grpc.RpcError, address: str) -> MedflError:
    """What went wrong, for a person."""
    code, text = error.code(), str(error.details() or "")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return PolicyRefused(f"The coordinator refuses: {text}")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return FederationError(f"The coordinator does not accept this: {text}")
    if code is grpc.StatusCode.INTERNAL and text.startswith("The coordinator"):
        return FederationError(f"{text} Try again later.")
    if "not yet valid" in text or "has expired" in text:
        return FederationError(
            f"The certificate of the coordinator at {address} has expired or is not yet valid by "
            "this machine's clock. Compare the clocks; if they agree, tell the coordinator to run: "
            "medfl-server renew"
        )
    if "errors resolving" in text or "DNS resolution failed" in text:
        return FederationError(
            f"The coordinator at {address} cannot be reached: its name has no address here. Check "
            "the spelling, and that this machine may ask a DNS server for outside names."
        )
    if "CERTIFICATE_VERIFY_FAILED" in text or "ostname" in text:
        return FederationError(
            f"What answers at {address} is not the coordinator of this federation: its "
            "certificate is not of the authority that was pinned at enrolment. Nothing was sent. "
            "Check the address; if it is right, telephone the coordinator."
        )
    reason = "no answer in time" if code is grpc.StatusCode.DEADLINE_EXCEEDED else "no connection"
    if "Connection refused" in text:
        return FederationError(
            f"The coordinator at {address} cannot be reached: its machine answers, and no server "
            "listens at that port. Check the port, or ask whether medfl-server runs."
        )
    if "Socket closed" in text or "onnection reset" in text:
        return HungUp(
            f"The coordinator at {address} cannot be reached: what answers hangs up before a word "
            "is said. Its server has just ended, or does not know this certificate or token, or "
            "something between cuts the line. Ask whether this site is enrolled there, and whether "
            "medfl-server runs."
        )
    return FederationError(
        f"The coordinator at {address} cannot be reached ({reason}). Check the address, the "
        "firewall (one outbound TCP connection) and the proxy settings; or its server is not "
        "running."
    )


def skew_warning(here: float, there: float) -> str:
    """What to say of the two clocks, "" where they agree well enough."""
    if abs(here - there) <= MAX_SKEW_S:
        return ""
    side = "ahead of" if here > there else "behind"
    return (
        f"clock skew: this machine's clock is {abs(here - there) / 60:.0f} minutes {side} the "
        "coordinator's. Set the clock (NTP) before anything else."
    )
