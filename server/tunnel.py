"""The coordinator's end of the tunnel: a hospital's fleet calls, let through to the SuperLink.

path allowed? -> body small enough? -> every node id in it the peer's own? -> signed -> SuperLink
A pull is held until there is a message. An answer is kept until the next call, so that a call whose
answer got lost on the way can be repeated and takes effect once.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from medfl.common import tunnel
from medfl.common.errors import FederationError
from medfl.common.shelf import Shelf
from medfl.common.tunnel import KEY_HEADER, Answer, Call
from medfl.server import nodes
from medfl.server.nodes import NodeKey
from medfl.server.parcels import Parcels
from medfl.server.register import Roster
from medfl.server.room import Room
from medfl.server.sessions import Sessions

log = logging.getLogger(__name__)

SiteOf = Callable[[grpc.ServicerContext], str]

# Calls that must not happen twice; the others may be repeated without harm.
_ONCE = {"register-node", "activate-node", "deactivate-node", "unregister-node"} | {
    "pull-messages",
    "push-messages",
}
_ARRIVALS = {"register-node", "activate-node"}
_KEPT_ANSWERS = 16
_HOLD_S = 20.0
# Without its bell a held pull still looks this often: most of what idle hospitals cost.
_LOOK_S = 10.0
_AT_ONCE = 4
MAX_UPLOAD = 8 * 1024**3
# Until a call's body is there; an object that follows has the time of the hospital's slowest line.
_BODY_S, _OBJECT_S = 300.0, 900.0

Within = Callable[[float, grpc.ServicerContext], AbstractContextManager[None]]


def fleet_handlers(
    gate: Gate, site_of: SiteOf, within: Within = lambda seconds, context: nullcontext()
) -> grpc.GenericRpcHandler:
    """The tunnel's service for a gRPC server.

    site_of: the name in the peer's certificate; it may abort the call itself. The server needs
    `tunnel.GRPC_OPTIONS` and at least two threads a site, because pulls are held. within: ends a
    call of which nothing comes for so long.
    """

    room = Room()

    def answered(read: Callable[[], Call], context: grpc.ServicerContext) -> bytes:
        site = site_of(context)
        try:
            answer = gate.answer(site, read(), context.is_active, partial(room.take, context))
            return tunnel.encode(answer)
        except FederationError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise  # abort never returns

    def piece(pieces: Iterator[bytes], seconds: float, context: grpc.ServicerContext) -> bytes:
        with within(seconds, context):
            return next(pieces, b"")

    def call(pieces: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return answered(lambda: tunnel.decode_call(piece(pieces, _BODY_S, context)), context)

    def upload(pieces: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        def ready() -> None:
            room.take(context)
            # The hospital sends the body when it hears this: a body that came before would lie in
            # the line's buffers, some MB a hospital.
            context.send_initial_metadata(())

        def read() -> Call:
            head = _uploading(piece(pieces, _BODY_S, context))
            ready()
            return replace(head, body=piece(pieces, _OBJECT_S, context))

        return answered(read, context)

    service, method = tunnel.METHOD.strip("/").split("/")
    return grpc.method_handlers_generic_handler(
        service,
        {
            # As a stream: who calls is known before there is a body to wait for.
            method: grpc.stream_unary_rpc_method_handler(call),
            tunnel.UPLOAD.rsplit("/", 1)[1]: grpc.stream_unary_rpc_method_handler(upload),
        },
    )


def _uploading(head: bytes) -> Call:
    """A push-object call whose body, the second piece, is read once there is room for it.

    Raises:
        FederationError: it is another call, or malformed.
    """
    call = tunnel.decode_call(head)
    if call.path != tunnel.PUSH_OBJECT or call.body:
        raise FederationError("Only the body of a push-object call may come in a piece of its own.")
    return call


class _Guest:
    """What the gate knows of one site."""

    def __init__(self, key: NodeKey) -> None:
        self.key = key
        self.once = threading.Lock()
        self.pulling = threading.Lock()
        # Grows with each SuperNode of the site; a pull of an earlier one must take nothing.
        self.generation = 0
        self.answers: OrderedDict[str, Answer] = OrderedDict()
        self.node_id: int | None = None
        # Bytes since the last pull: what the coordinator's disk takes from one site at a time.
        self.uploaded = 0
        self.parcels = Parcels()


class Gate:
    """The checks and the way to the SuperLink."""

    def __init__(
        self,
        superlink_address: str,
        key: str,
        roster: Roster,
        sessions: Sessions | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """sessions: those of the gateway, so that both know one live client a site.

        shelf: the SuperLink's large objects.
        """
        self._shelf = shelf
        host, port = superlink_address.rsplit(":", 1)
        self._host, self._port = host, int(port)
        self._key, self._roster = key, roster
        self._sessions = sessions or Sessions()
        self._guests: dict[str, _Guest] = {}
        self._lock = threading.Lock()
        # However many hospitals there are, so many objects are copied from hand to hand.
        self._bulk = threading.BoundedSemaphore(_AT_ONCE)
        self._idle: deque[http.client.HTTPConnection] = deque()

    def answer(
        self,
        site: str,
        call: Call,
        active: Callable[[], bool] = lambda: True,
        room: Callable[[], None] = lambda: None,
    ) -> Answer:
        """What the site gets. Raises FederationError for a body that Flower does not know.

        active: whether somebody still waits for it. room: waits for room for a large object.
        """
        limit = tunnel.ALLOWED.get(call.path)
        if limit is None:
            log.warning("site=%s asked for a path that is not open to hospitals", site)
            return Answer(404)
        if len(call.body) > limit:
            log.warning("site=%s sent %d bytes where %d are allowed", site, len(call.body), limit)
            return Answer(413)
        guest, name = self._guest(site), call.path.rsplit("/", 1)[1]
        arriving = name in _ARRIVALS
        if not self._sessions.holds(site, _session(call), arriving=arriving):
            log.warning("site=%s: a second client with the same certificate waits", site)
            return Answer(503 if arriving else 401)
        if name not in _ONCE:
            return self._checked(site, guest, name, call, active, room)
        generation = guest.generation
        with guest.pulling if name == "pull-messages" else guest.once:
            if generation != guest.generation:
                return Answer(401)
            if call.id in guest.answers:
                return guest.answers[call.id]
            answer = self._checked(site, guest, name, call, active, room)
            if answer.status not in (0, 503):
                guest.answers[call.id] = answer
                while len(guest.answers) > _KEPT_ANSWERS:
                    guest.answers.popitem(last=False)
            return answer

    def _guest(self, site: str) -> _Guest:
        with self._lock:
            if site not in self._guests:
                self._guests[site] = _Guest(NodeKey(self._key.encode(), site))
            return self._guests[site]

    def _checked(
        self,
        site: str,
        guest: _Guest,
        name: str,
        call: Call,
        active: Callable[[], bool],
        room: Callable[[], None],
    ) -> Answer:
        if name in _ARRIVALS:
            return self._arrive(site, guest, name, call)
        request = nodes.parsed(name, call.body)
        claimed = nodes.speakers(name, request)
        if guest.node_id is None and len(claimed) == 1:
            # After the coordinator's restart: Flower checks that key and id belong together.
            pass
        elif claimed != {guest.node_id}:
            log.warning("site=%s spoke in the name of another node; refused", site)
            return Answer(401)
        if name == "unregister-node":
            return Answer(200)  # the node stays for the next time
        if name == "push-object":
            guest.uploaded += len(call.body)
            if guest.uploaded > MAX_UPLOAD:
                log.warning("site=%s uploads more than an update can be; refused", site)
                return Answer(413)
        answer = self._work(site, guest, name, call, request, active, room)
        if answer.status == 200:
            guest.node_id = next(iter(claimed))
            self._roster.heard(site, guest.node_id)
            self._note(site, guest, name, call, answer)
        return answer

    def _arrive(self, site: str, guest: _Guest, name: str, call: Call) -> Answer:
        """Register the site's node, or activate it even if Flower believes it is still there."""
        body = nodes.with_key(name, call.body, guest.key.public)
        if name == "register-node":
            answer = self._pass(guest, call, body)
            # Registered at an earlier start: activation will name the node.
            return Answer(200) if answer.status in (409, 412) else answer
        answer = self._pass(guest, call, body)
        if answer.status not in (200, 503) and guest.node_id is not None:
            leave = Call("", call.path.replace("activate", "deactivate"), call.headers)
            self._pass(guest, leave, nodes.deactivation(guest.node_id))
            answer = self._pass(guest, call, body)
        if answer.status != 200:
            # Flower still believes in a node from before this coordinator started.
            return Answer(503)
        guest.node_id = nodes.activated(answer.body)
        guest.generation += 1
        guest.parcels.arrived()
        self._roster.arrived(site, guest.node_id)
        log.info("site=%s connected", site)
        return answer

    def _work(
        self,
        site: str,
        guest: _Guest,
        name: str,
        call: Call,
        request: Any,
        active: Callable[[], bool],
        room: Callable[[], None],
    ) -> Answer:
        if name == "pull-messages":
            return self._held(site, guest, call, active)
        ask = partial(self._pass, guest, call)
        if name == "pull-object":
            return guest.parcels.fetch(request, call.body, ask, self._shelf, room)
        if name == "push-object":
            return guest.parcels.store(request, call.body, ask, self._shelf)
        return self._pass(guest, call, call.body)

    def _held(self, site: str, guest: _Guest, call: Call, active: Callable[[], bool]) -> Answer:
        """The answer once it holds a message; status 0 after a while without one."""
        end, generation = time.monotonic() + _HOLD_S, guest.generation
        while generation == guest.generation:
            posted = self._roster.posted(site)
            answer, broke_off = self._tried(guest, call, call.body)
            brought = answer.status == 200 and nodes.delivered(answer.body)
            if broke_off and not brought:
                self._roster.broke_off(site)
            if answer.status != 200 or brought:
                return answer
            look = min(time.monotonic() + _LOOK_S, end)
            while self._roster.posted(site) == posted:
                if time.monotonic() >= end or not active():
                    return Answer(0)
                # Who waits here is there.
                if not self._sessions.holds(site, _session(call), arriving=False):
                    return Answer(401)
                if time.monotonic() >= look:
                    break
                self._roster.wait_for_post(site, posted, min(1.0, look - time.monotonic()))
        return Answer(401)

    def _note(self, site: str, guest: _Guest, name: str, call: Call, answer: Answer) -> None:
        if name == "pull-messages":
            guest.uploaded = 0
            guest.parcels.give(nodes.trees(answer.body))
            self._roster.gave(site, nodes.delivered(answer.body))
        elif name == "push-object":
            self._roster.moved(site)
        elif name == "push-messages":
            self._roster.moved(site)
            guest.parcels.want(nodes.lacking(answer.body))
            self._roster.got(site, nodes.answered(call.body))
            self._roster.ring()
        elif name == "confirm-message-received":
            guest.parcels.received(nodes.confirmed(call.body))
        elif name == "deactivate-node":
            self._roster.left(site)
            self._sessions.end(site, _session(call))

    def _pass(self, guest: _Guest, call: Call, body: bytes) -> Answer:
        """One HTTP call to the SuperLink; 503 where it cannot be reached or fails."""
        return self._tried(guest, call, body)[0]

    def _tried(self, guest: _Guest, call: Call, body: bytes) -> tuple[Answer, bool]:
        """`_pass`, and whether the SuperLink may have done it once without an answer."""
        headers = {n: v for n, v in call.headers.items() if n in PASSED_ON}
        headers |= guest.key.headers() | {KEY_HEADER: self._key}
        with self._bulk if call.path.endswith("-object") else nullcontext():
            return self._passed(call.path, body, headers)

    def _passed(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[Answer, bool]:
        broke_off = False
        for _ in range(2):
            connection = self._idle.pop() if self._idle else self._connection()
            try:
                connection.request("POST", path, body=body, headers=headers)
                got = connection.getresponse()
                content = got.read()
            except (OSError, http.client.HTTPException) as error:
                # The SuperLink closes idle connections, which shows only at the next use.
                connection.close()
                log.debug("a call to the engine failed: %s", type(error).__name__)
                broke_off = True
                continue
            self._idle.append(connection)
            if got.status >= 500:
                log.warning("the engine failed at a call: %d", got.status)
                return Answer(503), True
            back = {n.lower(): v for n, v in got.getheaders() if n.lower() in PASSED_BACK}
            return Answer(got.status, back, content), broke_off
        return Answer(503), broke_off

    def close(self) -> None:
        """Close the connections to the SuperLink."""
        while self._idle:
            self._idle.pop().close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=60)


def _session(call: Call) -> str:
    """The running medfl-client, by an id that it draws when it starts."""
    return call.headers.get(tunnel.SESSION, "")


PASSED_ON = frozenset(
    {
        "content-type",
        "accept",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    }
)
PASSED_BACK = frozenset({"content-type", "flwr-version-incompatibility-message"})
