"""The hatch between the two sides of a divided hospital: one unix socket, two users.

network side: `medfl-client line`       data side: `medfl-client start` and all other commands
TLS key, gateway, SuperNode, runner     images, signing key, approvals, ledger, log; no network

The data side calls. A connection begins with what it is for:
calls   a method and its body go to the coordinator, the answer comes back
tasks   the other way round: framed tasks come, replies go, sealed already
The kernel says who is at the other end; a socket's mode alone could be changed by mistake.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import grpc

from medfl.client.coordinator import CALL_S, Line
from medfl.common.coordination import METHODS, SERVICE
from medfl.common.errors import ConfigError, FederationError, TrainerDied

log = logging.getLogger(__name__)

PREFIX = "unix:"
CALLS, TASKS = b"calls", b"tasks"
_DONE, _FAILED = b"+", b"-"
# TLS certificates are the network side's own business, and enrolling is done before dividing.
PASSES = {f"/{SERVICE}/{name}": name for name in METHODS if name not in ("Enrol", "Renew")}
_MAX_CALL = 8 * 1024 * 1024
_GREETING_S, _REDIAL_S, _LOOK_S = 10.0, 1.0, 0.5
_LIMIT_S = 7 * 86400.0


class Trains(Protocol):
    """What the hatch needs of `medfl.client.runner.Trainer`."""

    def start(self) -> None:
        """Start the process."""

    def do(self, task: bytes) -> bytes | bytearray:
        """The reply. Raises TrainerDied."""

    def stop(self) -> None:
        """End the process."""


def is_hatch(address: str) -> bool:
    """Whether this address of the coordinator means the network side of this machine."""
    return address.startswith(PREFIX)


def peer_of(end: socket.socket) -> int:
    """User id of the process at the other end, as the kernel knows it (SO_PEERCRED, unix(7))."""
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


# ------------------------------------------------------------------------------ the data side


def dial(address: str, purpose: bytes) -> Connection:
    """A connection to the network side.

    Raises:
        ConfigError: others than the network side could have put the socket there.
        FederationError: nobody answers.
    """
    path = Path(address.removeprefix(PREFIX))
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder = path.parent.stat()
        if folder.st_mode & 0o022:
            raise ConfigError(f"{path.parent}: others may write there; run: chmod go-w on it")
        end.connect(str(path))
        if peer_of(end) != folder.st_uid:
            raise ConfigError(f"{path}: who answers is not the user that {path.parent} belongs to")
        pipe = Connection(end.detach())
        pipe.send_bytes(purpose)
        return pipe
    except OSError as error:
        raise FederationError(
            f"The network side does not answer at {path} ({error.strerror}). Start it there: "
            "medfl-client line; and this user must be the one that it was told to serve."
        ) from None
    finally:
        end.close()


@contextmanager
def line_through(address: str) -> Iterator[Line]:
    """A line to the coordinator through the network side."""
    channel = _Relayed(address)
    try:
        yield Line(address, channel)
    finally:
        channel.close()


class _Answered(grpc.RpcError):  # type: ignore[misc]  # grpc has no types
    """What the coordinator, or the network side, said instead of an answer."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class _Relayed:
    """What `Line` needs of a gRPC channel."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pipe: Connection | None = None
        self._lock = threading.Lock()

    def unary_unary(self, method: str) -> Callable[..., bytes]:
        """The call of a method, `/service/name`, bytes in and bytes out."""

        def call(body: bytes, timeout: float = CALL_S) -> bytes:
            with self._lock:
                try:
                    return self._exchange(method, body, timeout)
                except (EOFError, OSError):
                    self.close()
                    raise FederationError(
                        "The network side has hung up; the call is made again later."
                    ) from None

        return call

    def close(self) -> None:
        """Hang up; the next call dials again."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _exchange(self, method: str, body: bytes, timeout_s: float) -> bytes:
        if self._pipe is None:
            self._pipe = dial(self._address, CALLS)
        self._pipe.send_bytes(method.encode())
        self._pipe.send_bytes(body)
        # The network side gives up after CALL_S and says so.
        if not self._pipe.poll(timeout_s + _GREETING_S):
            raise EOFError
        status, answer = self._pipe.recv_bytes(16), self._pipe.recv_bytes(_MAX_CALL)
        if status == _DONE:
            return answer
        code, details = json.loads(answer)
        raise _Answered(grpc.StatusCode[code], details)


@contextmanager
def attached(address: str, trainer: Trains, session: str = "") -> Iterator[None]:
    """Do the tasks that the network side hands over, meanwhile.

    session: as the coordinator was told; the tunnel must name the same.
    """
    stopping = threading.Event()
    thread = threading.Thread(
        target=_do_tasks, args=(address, trainer, session, stopping), name="tasks", daemon=True
    )
    trainer.start()
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        trainer.stop()
        thread.join(timeout=10)


def _do_tasks(address: str, trainer: Trains, session: str, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            with dial(address, TASKS) as pipe:
                pipe.send_bytes(session.encode())
                while not stopping.is_set():
                    if pipe.poll(_LOOK_S):
                        _do_one(pipe, trainer, pipe.recv_bytes())
        except (EOFError, OSError, FederationError, ConfigError) as error:
            log.debug("no tasks: %s", error)
            stopping.wait(_REDIAL_S)


def _do_one(pipe: Connection, trainer: Trains, task: bytes) -> None:
    try:
        reply = trainer.do(task)
    except TrainerDied as error:
        log.warning("%s", error)
        pipe.send_bytes(_FAILED)
        return
    pipe.send_bytes(_DONE)
    pipe.send_bytes(reply)


# --------------------------------------------------------------------------- the network side


class FarTrainer:
    """The data side's trainer as the runner sees it: without memory of any task."""

    def __init__(self, limit_s: float = _LIMIT_S) -> None:
        self.session = ""
        self._pipe: Connection | None = None
        self._lock = threading.Lock()
        self._limit_s = limit_s

    def attach(self, pipe: Connection, session: str = "") -> None:
        """Take tasks over this connection from now on; the one before is dropped."""
        with self._lock:
            self._drop()
            self._pipe, self.session = pipe, session

    @property
    def attached(self) -> bool:
        """Whether the data side is there."""
        if not self._lock.acquire(blocking=False):
            return True  # at work
        try:
            # It says nothing unasked, so that anything to be read is its end.
            if self._pipe is not None and self._pipe.poll(0):
                self._drop()
            return self._pipe is not None
        finally:
            self._lock.release()

    def start(self) -> None:
        """Nothing: the data side starts its own."""

    def do(self, task: bytes) -> bytes:
        """The reply to a framed task. Raises TrainerDied where there is none."""
        with self._lock:
            if self._pipe is None:
                raise TrainerDied("The data side is not there.")
            try:
                self._pipe.send_bytes(task)
                if not self._pipe.poll(self._limit_s):
                    raise EOFError
                if self._pipe.recv_bytes(16) != _DONE:
                    raise TrainerDied("The training process ended.")
                return self._pipe.recv_bytes()
            except (EOFError, OSError):
                self._drop()
                raise TrainerDied("The data side has hung up.") from None

    def stop(self) -> None:
        """Hang up; a task at work is lost."""
        pipe = self._pipe
        if pipe is not None:
            # Wakes whoever waits in `do`, which a close would not.
            with suppress(OSError), socket.socket(fileno=os.dup(pipe.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


class Hatch:
    """The network side's end at `path`, open to the users in `peers` alone.

    line: to the coordinator; None while there is none.
    """

    def __init__(self, path: Path, peers: frozenset[int]) -> None:
        self.line: Line | None = None
        self.trainer = FarTrainer()
        self._path, self._peers = path, peers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def start(self) -> None:
        """Listen. Raises ConfigError where that is not possible."""
        try:
            # Whoever calls holds the lock of the only network side on this folder.
            self._path.unlink(missing_ok=True)
            self._listener.bind(str(self._path))
            self._path.chmod(0o660)
            self._listener.listen(16)
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be listened on ({error.strerror})") from None
        threading.Thread(target=self._accept, name="hatch", daemon=True).start()

    def stop(self) -> None:
        """Listen no more; connections end with their callers or this process."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self.trainer.stop()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            if peer_of(end) not in self._peers:
                log.warning("user %d of this machine was turned away", peer_of(end))
                end.close()
                continue
            pipe = Connection(end.detach())
            threading.Thread(target=self._greet, args=(pipe,), name="caller", daemon=True).start()

    def _greet(self, pipe: Connection) -> None:
        with suppress(EOFError, OSError):
            purpose = pipe.recv_bytes(16) if pipe.poll(_GREETING_S) else b""
            if purpose == TASKS:
                session = pipe.recv_bytes(256) if pipe.poll(_GREETING_S) else b""
                self.trainer.attach(pipe, session.decode("ascii", "replace"))
                return
            while purpose == CALLS:
                method, body = pipe.recv_bytes(256), pipe.recv_bytes(_MAX_CALL)
                status, answer = self._call(method.decode("ascii", "replace"), body)
                pipe.send_bytes(status)
                pipe.send_bytes(answer)
        pipe.close()

    def _call(self, method: str, body: bytes) -> tuple[bytes, bytes]:
        line = self.line
        if method not in PASSES:
            return _refusal(grpc.StatusCode.PERMISSION_DENIED, "This call does not pass the hatch.")
        if line is None:
            return _refusal(grpc.StatusCode.UNAVAILABLE, "no line")
        send: Any = line.channel.unary_unary(method)
        try:
            return _DONE, bytes(send(body, timeout=CALL_S))
        except grpc.RpcError as error:
            return _refusal(error.code(), str(error.details() or ""))
        except ValueError:
            # The channel was closed meanwhile: the next one has a renewed certificate.
            return _refusal(grpc.StatusCode.UNAVAILABLE, "the line is being renewed")


def _refusal(code: grpc.StatusCode, details: str) -> tuple[bytes, bytes]:
    return _FAILED, json.dumps([code.name, details]).encode()
