"""The hospital's end of the tunnel: what the SuperNode takes for its SuperLink.

A SuperNode stops working for good after one bad answer. So it gets none: calls wait here until the
coordinator has answered, however often the line is cut, and the SuperNode hears `102 Processing`
meanwhile (RFC 2518, section 10.1), which keeps its request alive.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from medfl.client.heartbeat import survivable
from medfl.client.objects import shelved, unshelved
from medfl.common import tunnel
from medfl.common.errors import FederationError
from medfl.common.shelf import LARGE, Shelf
from medfl.common.tunnel import Answer, Call

log = logging.getLogger(__name__)

_STILL_HERE_S = 8.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 15.0
# The SuperNode gives a heartbeat 5 s and then tries again.
_HEARTBEAT_S = 4.0
_TIMEOUT_S = 900.0
# Between two attempts at a part that is not there yet, the SuperNode waits up to 12 s.
_QUIET_S, _OVER_QUIET_S = 20.0, 2.0
_HELD_TIMEOUT_S = 60.0
# What a SuperNode understands: done, start anew (401), the run is over (403).
_UNDERSTOOD = {200, 401, 403}

Tick = Callable[[], None]


class Forwarder:
    """A loopback HTTP server whose requests travel through `channel`.

    session: the running client's, as it was told to the coordinator.
    mail: set whenever a message came for this site, so that whoever executes it need not poll.
    shelf: the SuperNode's, which then handles tickets instead of large objects.
    """

    def __init__(self, channel: grpc.Channel, session: str = "") -> None:
        self.mail = threading.Event()
        self.shelf: Shelf | None = None
        self.session = session or secrets.token_hex(16)
        self.stopping = threading.Event()
        self.heard = time.monotonic()
        self._fetch = _Fetch()
        self._ask: Any = channel.unary_unary(tunnel.METHOD)
        self._upload: Any = channel.stream_unary(tunnel.UPLOAD)
        self._server: _Server | None = None

    def start(self) -> str:
        """Listen on a free loopback port; returns host:port."""
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, name="forwarder", daemon=True).start()
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def stop(self) -> None:
        """End; calls that wait are dropped."""
        self.stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @property
    def silent_s(self) -> float:
        """Seconds since the SuperNode last made a call: it sends heartbeats while it is well."""
        return time.monotonic() - self.heard

    @property
    def has_given_up(self) -> bool:
        """Whether the SuperNode has stopped fetching a message of which it lacks something.

        It does so for good when the message's run ends meanwhile, and tells nobody.
        """
        return self._fetch.quiet_s > (_OVER_QUIET_S if self._fetch.over else _QUIET_S)

    def forward(self, path: str, headers: dict[str, str], body: bytes, tick: Tick) -> Answer:
        """The coordinator's answer. `tick` is called while it takes time; it may raise OSError."""
        self.heard = time.monotonic()
        if self.shelf is not None and path == tunnel.PUSH_OBJECT:
            body = unshelved(self.shelf, body)
        if path not in tunnel.FETCH:
            return self._forward(path, headers, body, tick)
        with self._fetch:
            answer = self._forward(path, headers, body, tick)
            self._fetch.over = answer.status == 403
            if self.shelf is not None and path == tunnel.PULL_OBJECT and answer.status == 200:
                answer = replace(answer, body=shelved(self.shelf, body, answer.body))
            return answer

    def _forward(self, path: str, headers: dict[str, str], body: bytes, tick: Tick) -> Answer:
        call = Call(secrets.token_hex(16), path, headers | {tunnel.SESSION: self.session}, body)
        patience_s = _HEARTBEAT_S if path == tunnel.HEARTBEAT else float("inf")
        started, wait_s = time.monotonic(), _FIRST_WAIT_S
        while not self.stopping.is_set() and time.monotonic() - started < patience_s:
            answer = self._once(call, started + patience_s - time.monotonic(), tick)
            if answer is not None and answer.status == 200 and path == tunnel.HEARTBEAT:
                answer = survivable(answer)
            if answer is not None and answer.status in _UNDERSTOOD:
                if path == tunnel.PULL and answer.body:
                    self._fetch.begin()
                    self.mail.set()
                return answer
            if answer is not None and answer.status == 0:
                wait_s = _FIRST_WAIT_S
                tick()
                continue
            if answer is not None and answer.status != 503:
                log.error("the coordinator refused %s with %d", path, answer.status)
                return Answer(503 if path == tunnel.HEARTBEAT else 401)
            end = min(time.monotonic() + wait_s, started + patience_s)
            while time.monotonic() < end and not self.stopping.is_set():
                tick()
                self.stopping.wait(min(1.0, max(0.0, end - time.monotonic())))
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        return Answer(503)

    def _once(self, call: Call, limit_s: float, tick: Tick) -> Answer | None:
        """One attempt; None where the line or the coordinator is down."""
        timeout_s = _HELD_TIMEOUT_S if call.path == tunnel.PULL else _TIMEOUT_S
        timeout_s = min(timeout_s, limit_s)
        if call.path == tunnel.PUSH_OBJECT and len(call.body) >= LARGE:
            asked = self._pushed(call, timeout_s)
        else:
            asked = self._ask.future(tunnel.encode(call), timeout=timeout_s)
        try:
            while True:
                try:
                    raw = asked.result(timeout=1.0)
                    return tunnel.decode_answer(raw)
                except grpc.FutureTimeoutError:
                    if self.stopping.is_set():
                        return None
                    tick()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                return Answer(400)
            log.debug("the line is down: %s", error.code())
            return None
        except FederationError as error:
            log.error("%s", error)
            return None
        finally:
            asked.cancel()

    def _pushed(self, call: Call, timeout_s: float) -> Any:
        """A large object's call; the body follows when the coordinator has room for it."""
        begun: SimpleQueue[Any] = SimpleQueue()

        def pieces() -> Iterator[bytes]:
            yield tunnel.encode(replace(call, body=b""))
            begun.get().initial_metadata()  # waits for the coordinator's word, or the call's end
            yield call.body

        asked = self._upload.future(pieces(), timeout=timeout_s)
        begun.put(asked)
        return asked


class _Fetch:
    """The SuperNode's calls for parts of a message. over: the last answer was that the run is."""

    clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.over = False
        self._running = 0
        self._last = self.clock()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A message was announced."""
        with self._lock:
            self.over, self._last = False, self.clock()

    @property
    def quiet_s(self) -> float:
        """Seconds since the announcement or the last call's end; 0 while a call goes on."""
        with self._lock:
            return 0.0 if self._running else self.clock() - self._last

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._running -= 1
            self._last = self.clock()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, forwarder: Forwarder) -> None:
        self.forwarder = forwarder
        super().__init__(("127.0.0.1", 0), _Request)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Only this user's own SuperNode may speak for the hospital; other local users may not."""
        owner = owner_of(client_address, self.server_address)
        if owner is not None and owner != os.geteuid():
            log.warning("another user of this machine tried to use the tunnel")
            return False
        return True

    def handle_error(self, request: object, client_address: object) -> None:
        """A SuperNode that hung up is no news."""
        log.debug("a request of the SuperNode broke off", exc_info=True)


def owner_of(peer: Any, own: Any) -> int | None:
    """User id of the IPv4 loopback connection from `peer` to `own`; None where Linux cannot say."""

    def written(address: Any) -> str:
        # As /proc/net/tcp writes it: the address in the machine's byte order, in hex.
        number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
        return f"{number:08X}:{address[1]:04X}"

    wanted = [written(peer), written(own)]
    try:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return None
    for fields in map(str.split, lines):
        if fields[1:3] == wanted:
            return int(fields[7])
    return None


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Answers are small and many: without this each would wait for the acknowledgement before it.
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        """Any call of the SuperNode."""
        length = self.headers.get("content-length", "")
        limit = tunnel.ALLOWED.get(self.path)
        if limit is None or not length.isdigit() or int(length) > limit:
            self.close_connection = True
            self.send_error(404 if limit is None else 413)
            return
        body = self.rfile.read(int(length))
        self._last = time.monotonic()
        headers = {n.lower(): v for n, v in self.headers.items() if n.lower() in _SENT}
        answer = self.server.forwarder.forward(self.path, headers, body, self._tick)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _tick(self) -> None:
        """Tell the SuperNode that its answer is still to come.

        Raises:
            ConnectionError: it is gone; a message that came now would be lost.
        """
        with suppress(BlockingIOError):
            if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise ConnectionError("the SuperNode hung up")
        if time.monotonic() - self._last >= _STILL_HERE_S:
            self._last = time.monotonic()
            self.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the SuperNode logs its calls itself."""


_SENT = frozenset(
    {
        "content-type",
        "accept",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    }
)
