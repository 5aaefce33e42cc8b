"""The one port that faces outwards: gRPC over mutual TLS 1.3, and who may call what.

Nobody gets further than the handshake without a certificate of this federation's authority or of
a token that is remembered. Which of them it is, and whether it still holds, is asked of the state
on disk at every call, so that a revocation needs no restart and no new handshake.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from medfl import __version__
from medfl.common import certificates, coordination
from medfl.common.coordination import (
    METHODS,
    SERVICE,
    AskStudies,
    Bye,
    Decide,
    Done,
    Enrol,
    Enrolled,
    HeadSeen,
    Heard,
    Hello,
    Renew,
    Report,
    ShowHead,
    Studies,
    Welcome,
)
from medfl.common.denials import Denials
from medfl.common.errors import ConfigError, FederationError, MedflError, PolicyRefused
from medfl.common.kept import save_record
from medfl.server import authority, heads, studies
from medfl.server.authority import Guest
from medfl.server.bounds import (
    HANDSHAKE_S,
    Doorman,
    Turnstile,
    connections_within,
    raise_descriptors,
)
from medfl.server.federation import Federation, SiteRecord
from medfl.server.sessions import Sessions
from medfl.server.settings import ServerSettings

log = logging.getLogger(__name__)

# Flower's largest piece of a message with room around it; a larger call is refused unread.
MAX_CALL = 8 * 1024 * 1024
_RENEW_AT = 1 / 3
# A message of the coordinator's service is small; a line of 50 kbit/s carries the largest in this.
_BODY_S = 180.0
_GUESTS_BODY_S = 15.0
_IDLE_S = 600
_STREAMS = 64


class Peers:
    """Who is at the other end of a call; what to give to other services of the same port."""

    def __init__(self, federation: Federation, sessions: Sessions | None = None) -> None:
        self.federation = federation
        self.sessions = sessions or Sessions()
        self._turnstile = Turnstile()

    def who(self, context: grpc.ServicerContext) -> SiteRecord | Guest:
        """The caller, asked once a call; ends the call where it is unknown, or has too many open.

        Unknown is UNAUTHENTICATED, too many is RESOURCE_EXHAUSTED.
        """
        shown = context.auth_context()
        if shown.get("ssl_tls_version", [b"TLSv1.3"])[0] != b"TLSv1.3":
            _end(context, grpc.StatusCode.UNAUTHENTICATED, "Only TLS 1.3 is spoken here.")
        pem = shown.get("x509_pem_cert", [b""])[0]
        if not self._turnstile.enters(pem, context):
            _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "You have too many calls open.")
        try:
            return authority.identify(self.federation, pem)
        except PolicyRefused as error:
            log.warning("a caller was refused: %s", error)
            _end(context, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except MedflError as error:
            log.error("the state could not be read: %s", error)
            _end(context, grpc.StatusCode.INTERNAL, "The coordinator cannot read its own state.")

    def site_of(self, context: grpc.ServicerContext) -> str:
        """Name of the calling site; ends the call for guests and strangers."""
        return self.record_of(context).name

    def record_of(self, context: grpc.ServicerContext) -> SiteRecord:
        """Record of the calling site; ends the call for guests and strangers."""
        caller = self.who(context)
        if isinstance(caller, Guest):
            _end(context, grpc.StatusCode.UNAUTHENTICATED, "A token only serves to enrol.")
        return caller


class Coordinator:
    """The coordinator service: one method for each line of `METHODS`."""

    def __init__(self, peers: Peers, settings: ServerSettings, doorman: Doorman) -> None:
        self._peers, self._doorman = peers, doorman
        self._federation = peers.federation
        self._denials = Denials()
        self._settings = settings

    def enrol(self, caller: Guest, asked: Enrol) -> Enrolled:
        return authority.enrol(self._federation, caller, asked, self._settings.certificate_days)

    def renew(self, caller: SiteRecord, asked: Renew) -> Enrolled:
        days = self._settings.certificate_days
        return authority.renew(self._federation, caller, asked.request, days)

    def hello(self, caller: SiteRecord, asked: Hello) -> Welcome:
        try:
            self._peers.sessions.begin(caller.name, asked.session)
        except PolicyRefused:
            if times := self._denials.times("second session", caller.name):
                self._federation.record("second session refused", site=caller.name, times=times)
            raise
        return Welcome(
            now=self._federation.clock(),
            federation=self._federation.name,
            version=__version__,
            certificate_ends=caller.ends,
            sites=self._others(caller),
        )

    def _others(self, caller: SiteRecord) -> dict[str, str]:
        """Signing keys of the other sites, by name."""
        return {
            s.name: s.signing_key
            for s in self._federation.sites()
            if s.status == "active" and s.name != caller.name
        }

    def bye(self, caller: SiteRecord, asked: Bye) -> Done:
        self._peers.sessions.end(caller.name, asked.session)
        return Done(self._federation.clock())

    def studies(self, caller: SiteRecord, asked: AskStudies) -> Studies:
        found = tuple(studies.published(self._federation))
        return Studies(self._federation.clock(), found, self._others(caller))

    def decide(self, caller: SiteRecord, asked: Decide) -> Done:
        studies.decide(self._federation, caller, asked.decision)
        return Done(self._federation.clock())

    def heads(self, caller: SiteRecord, asked: ShowHead) -> HeadSeen:
        return heads.exchange(self._federation, caller, asked)

    def report(self, caller: SiteRecord, asked: Report) -> Heard:
        self._peers.sessions.touch(caller.name, asked.session)
        at = self._federation.clock()
        place = self._federation.state / "reports" / f"{caller.name}.json"
        save_record(place, Said(at=at, state=asked.state, study=asked.study, round=asked.round))
        return Heard(at, self._federation.audit.head().n)

    def handlers(self) -> grpc.GenericRpcHandler:
        """As one service for a grpc.Server."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: self._handler(name) for name in METHODS}
        )

    def _handler(self, name: str) -> grpc.RpcMethodHandler:
        kind, answer = METHODS[name][0], getattr(self, name.lower())

        def handle(pieces: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            caller = self._peers.who(context)
            is_guest = isinstance(caller, Guest)
            if is_guest != (name == "Enrol"):
                text = "A token only serves to enrol, and enrolling needs a token."
                _end(context, grpc.StatusCode.UNAUTHENTICATED, text)
            with self._doorman.within(_GUESTS_BODY_S if is_guest else _BODY_S, context):
                body = next(pieces, b"")
            try:
                return coordination.encode(answer(caller, coordination.decode(body, kind)))
            except MedflError as error:
                log.warning("%s of %s was refused: %s", name, _name(caller), error)
                _abort(context, error)

        # As a stream: who calls is known, and may be refused, before there is a body to wait for.
        return grpc.stream_unary_rpc_method_handler(handle)


@dataclass(frozen=True, slots=True)
class Said:
    """A site's last report. at: seconds since 1970."""

    at: float
    state: str
    study: str
    round: int


class Gateway:
    """The server: `start`, then `stop`; `port` is the one that was bound."""

    def __init__(
        self,
        federation: Federation,
        settings: ServerSettings,
        peers: Peers | None = None,
        more: Sequence[grpc.GenericRpcHandler] = (),
        doorman: Doorman | None = None,
    ) -> None:
        """more: services of the same port, such as the tunnel; they ask `peers` who calls.

        doorman: shared with them.
        """
        self.peers = peers or Peers(federation)
        self._federation, self._settings = federation, settings
        refuse_expired(federation)
        federation.signing_key()  # a damaged key stops the start, not the first run
        most = connections_within(settings.connections, settings.workers, raise_descriptors())
        self._most, self.doorman = most, doorman or Doorman()
        self._server = grpc.server(
            ThreadPoolExecutor(settings.workers, thread_name_prefix="gateway"),
            options=[
                ("grpc.max_receive_message_length", MAX_CALL),
                ("grpc.max_send_message_length", MAX_CALL),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.so_reuseport", 0),
                ("grpc.max_allowed_incoming_connections", most),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.max_connection_idle_ms", _IDLE_S * 1000),
                # A hospital that is gone without a word is noticed, and a quiet one stays.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=2 * settings.workers,
        )
        own = Coordinator(self.peers, settings, self.doorman).handlers()
        self._server.add_generic_rpc_handlers([own, *more])
        self._last: tuple[bytes, bytes, bytes] = self._certificates()
        self._changing = threading.Lock()
        credentials = grpc.dynamic_ssl_server_credentials(
            _as_configuration(self._last), self._changed, require_client_authentication=True
        )
        try:
            self.port = int(self._server.add_secure_port(settings.listen, credentials))
        except RuntimeError:
            raise ConfigError(
                f"{settings.listen}: cannot be listened on. Another program has the port, or the "
                "address is not this machine's; see `listen` in server.toml"
            ) from None

    def start(self) -> None:
        """Answer from now on."""
        self._server.start()
        self.doorman.start(self.port, self._most)

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no new call, let running ones end within `grace_s`."""
        self.doorman.stop()
        self._server.stop(grace_s).wait(grace_s + 5)

    def _changed(self) -> Any:
        """What the next handshake shows and trusts; None where that is as before.

        gRPC frees what it replaces while other handshakes may still be using it, and dies of that
        where many connect at once: so nothing is replaced without need.
        """
        with self._changing:
            try:
                now = self._certificates()
            except (OSError, MedflError) as error:
                log.error("the certificates could not be read; the last ones hold: %s", error)
                return None
            if now == self._last:
                return None
            self._last = now
        return _as_configuration(now)

    def _certificates(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate and whom to trust, from the disk."""
        key, shown = self._federation.gateway()
        left = certificates.ends_at(shown) - self._federation.clock()
        if left < _RENEW_AT * certificates.life_of(shown):
            authority.renew_gateway(self._federation, self._settings)
            key, shown = self._federation.gateway()
        _, own = self._federation.authority()
        trusted = [certificates.pem_of(own)]
        trusted += [known.anchor for known in authority.anchors(self._federation)]
        pem = certificates.pem_of(shown).encode()
        return certificates.key_pem(key), pem, "".join(trusted).encode()


def _as_configuration(found: tuple[bytes, bytes, bytes]) -> Any:
    key, shown, trusted = found
    return grpc.ssl_server_certificate_configuration([(key, shown)], root_certificates=trusted)


def refuse_expired(federation: Federation) -> None:
    """Raises ConfigError where a certificate that the gateway needs has expired."""
    now = federation.clock()
    if now >= certificates.ends_at(federation.authority()[1]):
        raise ConfigError(
            "The federation's authority has expired. Make a new federation with `medfl-server "
            "init` and invite the sites again."
        )
    if now >= certificates.ends_at(federation.gateway()[1]):
        raise ConfigError("The gateway's certificate has expired; run: medfl-server renew")


_CODES: tuple[tuple[type[MedflError], grpc.StatusCode], ...] = (
    (PolicyRefused, grpc.StatusCode.PERMISSION_DENIED),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (FederationError, grpc.StatusCode.INVALID_ARGUMENT),
)


def _abort(context: grpc.ServicerContext, error: MedflError) -> NoReturn:
    for kind, code in _CODES:
        if isinstance(error, kind):
            _end(context, code, str(error))
    # A disk's fault: its text names the coordinator's paths and is for the coordinator only.
    _end(context, grpc.StatusCode.INTERNAL, "The coordinator cannot keep its state just now.")


def _end(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise RuntimeError("abort has raised already")


def _name(caller: SiteRecord | Guest) -> str:
    return f"a guest for {caller.invitation.site}" if isinstance(caller, Guest) else caller.name
