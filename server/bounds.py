"""How much a peer may hold of the gateway at once, and all of them together.

connections   in all: gRPC refuses more. Of one address: a quarter, cut by `Doorman`
handshakes    each has `HANDSHAKE_S`
calls         of one certificate: `CALLS_OF_ONE`. In all: the workers and as many that wait
bodies        each call says how long its body may take; then `Doorman` ends the call

So what idles, dawdles or knocks without end costs its own peer, and no descriptor or thread that
the others need.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import grpc

log = logging.getLogger(__name__)

# What the process holds beside connections: files of the state, the log, the engine's pipes.
_RESERVED = 192
_MOST_DESCRIPTORS = 65_536
HANDSHAKE_S = 20
# A hospital holds one pull, a heartbeat, and two transfers each way; twice that after a cut line.
CALLS_OF_ONE = 24
_SHARE_OF_ONE_ADDRESS = 4
_LOOK_S = 0.5
# In Linux's tcp_info: bytes that the peer has sent and we have acknowledged (64 bits).
_INFO_BYTES, _RECEIVED_AT = 136, 128


def raise_descriptors() -> int:
    """Let this process, and what it starts, open as many files as it may; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
            return ceiling
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_within(wanted: int, workers: int, descriptors: int) -> int:
    """Connections for which there are descriptors, when every worker holds one of its own too."""
    room = max(16, descriptors - workers - _RESERVED)
    if room < wanted:
        log.warning(
            "%d descriptors are allowed: %d connections instead of %d. Raise the limit "
            "(LimitNOFILE= of systemd, or ulimit -n) where more hospitals are to connect",
            descriptors,
            room,
            wanted,
        )
    return min(wanted, room)


@dataclass(slots=True)
class Turnstile:
    """Calls that each peer has open. most: of one peer."""

    most: int = CALLS_OF_ONE
    _open: Counter[bytes] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enters(self, peer: bytes, context: grpc.ServicerContext) -> bool:
        """Whether the peer may have one more; it is counted until the call ends."""
        with self._lock:
            if self._open[peer] >= self.most:
                return False
            self._open[peer] += 1
        if not context.add_callback(lambda: self._leave(peer)):
            self._leave(peer)
        return True

    def _leave(self, peer: bytes) -> None:
        with self._lock:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


class Doorman:
    """One thread that ends calls whose body does not come, and connections of a crowding address.

    Of one address those go first that have sent least: what has not even begun a handshake.
    """

    def __init__(self) -> None:
        self.port = self.of_one = 0
        self._waiting: dict[object, tuple[float, Callable[[], None]]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="doorman", daemon=True)

    def start(self, port: int, connections: int) -> None:
        """Watch the connections of this port of ours, so many in all, and the bodies."""
        self.port, self.of_one = port, max(8, connections // _SHARE_OF_ONE_ADDRESS)
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)

    @contextmanager
    def within(self, seconds: float, context: grpc.ServicerContext) -> Iterator[None]:
        """What is read of the call meanwhile must come in this time, or the call ends."""
        mine = object()
        self._waiting[mine] = (time.monotonic() + seconds, context.cancel)
        try:
            yield
        finally:
            del self._waiting[mine]

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            try:
                self._end_late()
                self._cut_crowds()
            except Exception:
                log.exception("the connections could not be looked at; trying again")

    def _end_late(self) -> None:
        now = time.monotonic()
        for end, cancel in list(self._waiting.values()):
            if now > end:
                cancel()

    def _cut_crowds(self) -> None:
        names = os.listdir("/proc/self/fd")
        if len(names) <= self.of_one:
            return
        by_address: dict[str, list[tuple[int, int]]] = {}
        for number in map(int, names):
            with suppress(OSError), _connection(number) as line:
                if line.getsockname()[1] == self.port:
                    found = (_received(line), number)
                    by_address.setdefault(line.getpeername()[0], []).append(found)
        for address, lines in by_address.items():
            crowd = sorted(lines)[: max(0, len(lines) - self.of_one)]
            if crowd:
                log.warning("%s has %d connections; %d are cut", address, len(lines), len(crowd))
            for _, number in crowd:
                self._cut(number, address)

    def _cut(self, number: int, address: str) -> None:
        """gRPC sees that the peer has hung up, and closes; the number may be another's by now."""
        with suppress(OSError), _connection(number) as line:
            if line.getsockname()[1] == self.port and line.getpeername()[0] == address:
                line.shutdown(socket.SHUT_RDWR)


@contextmanager
def _connection(number: int) -> Iterator[socket.socket]:
    """Another handle of this descriptor's TCP connection. Raises OSError where it is none."""
    if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
        raise OSError("no socket")
    handle = os.dup(number)
    try:
        line = socket.socket(fileno=handle)
    except OSError:
        os.close(handle)
        raise
    with line:
        if line.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError("no TCP connection")
        yield line


def _received(line: socket.socket) -> int:
    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    return int.from_bytes(info[_RECEIVED_AT : _RECEIVED_AT + 8], sys.byteorder)
