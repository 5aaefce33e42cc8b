"""The hospital's executor: it takes tasks from the SuperNode and lets the trainer do them.

task -> is its bundle medfl's own empty one? -> trainer process -> reply -> SuperNode
Code that came with a task is compared and never opened.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import grpc

from medfl.client.hatch import Trains
from medfl.client.tasks import Task, Tasks
from medfl.client.trainer import frame
from medfl.client.tunnel import Forwarder
from medfl.common.bundle import study_bundle
from medfl.common.child import Child, Launch, received
from medfl.common.errors import FederationError, MedflError, OtherCode, TrainerDied
from medfl.common.messages import Instruction, refusal
from medfl.common.shelf import Shelf

log = logging.getLogger(__name__)

_IDLE_S, _BUSY_S, _MAIL_S = 2.0, 0.02, 15.0
# A SuperNode that is well makes a call at least every 25 s; after three it has stopped working.
_SILENT_S = 80.0
# Below so much free disk, what the coordinator sends stays in memory as far as that goes.
_FREE_BYTES = 2**30
# Importing torch from a slow disk takes its time.
_START_S = 180.0
_LOG_BYTES = 10_000_000


class Trainer:
    """The training process, warm between tasks and replaced when it dies.

    command: of the process. limit_s: a task that takes longer is given up.
    """

    def __init__(self, command: Sequence[str], log_file: Path, limit_s: float = 7 * 86400) -> None:
        self._command, self._log_file, self._limit_s = list(command), log_file, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()
        self._fresh = True
        self._closing = False

    @classmethod
    def for_hospitals(cls, where: str, argument: str, log_file: Path) -> Trainer:
        """A trainer whose hospitals `where` ("module:function") finds with `argument`."""
        command = [sys.executable, "-P", "-m", "medfl.client.trainer", where, argument]
        return cls(command, log_file)

    @property
    def pid(self) -> int | None:
        """Process id of the present one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; importing goes on in it while this one goes on."""
        with self._lock:
            self._start()

    def do(self, task: bytes) -> bytes | bytearray:
        """The reply to a framed task.

        Raises:
            TrainerDied: there is no reply; the next task gets a new process.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                if self._fresh and self._received(_START_S) != b"ready":
                    raise EOFError
                self._fresh = False
                self._sent(task)
                return self._received(self._limit_s)
            except (EOFError, OSError):
                code = self._ended()
                if not self._closing:
                    log.warning("the training process ended (exit code %s); it is replaced", code)
                    with suppress(OSError):  # a full disk: tried again with the next task
                        self._start()
                raise TrainerDied(f"The training process ended (exit code {code}).") from None

    def stop(self) -> None:
        """End the process; a task in it is lost."""
        self._closing = True
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with self._lock:
            self._close()

    def _sent(self, task: bytes) -> None:
        if self._pipe is None:
            raise EOFError
        self._pipe.send_bytes(task)

    def _received(self, limit_s: float) -> bytes | bytearray:
        if self._pipe is None or not self._pipe.poll(limit_s):
            raise EOFError
        return received(self._pipe)

    def _ended(self) -> int | None:
        if self._process is None:
            return None
        try:
            return self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _start(self) -> None:
        self._close()
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        size = self._log_file.stat().st_size if self._log_file.exists() else 0
        with self._log_file.open("ab" if size < _LOG_BYTES else "wb") as output:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "MEDFL_PIPE": str(theirs.fileno())},
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        self._pipe = Connection(ours.detach())
        self._fresh = True


class Node:
    """The supervised SuperNode of this site."""

    def __init__(self, forwarder: Forwarder, folder: Path) -> None:
        self._forwarder, self._folder = forwarder, folder
        self._superlink = ""
        self.address, self.secret = "", ""
        self._shelf = forwarder.shelf = Shelf(folder / "objects", leave=_FREE_BYTES)
        self.child = Child("SuperNode", self._launch, folder / "supernode.log")

    def start(self, superlink: str) -> None:
        """Start it against the tunnel's end at `superlink`."""
        self._superlink = superlink
        self.child.start()

    def stop(self) -> None:
        """End it; it tells the coordinator that this site leaves."""
        self.child.stop()

    def tasks(self) -> Tasks:
        """What it has for this site to do."""
        given_up = lambda: self._forwarder.has_given_up  # noqa: E731
        return Tasks(self.address, self.secret, given_up, self._shelf)

    def check(self) -> None:
        """Replace a SuperNode that lives and does nothing."""
        if self.child.pid is not None and self._forwarder.silent_s > _SILENT_S:
            log.warning("the SuperNode has been silent for %.0f s", self._forwarder.silent_s)
            self._forwarder.heard = time.monotonic()
            self.child.replace()

    def _launch(self) -> Launch:
        self.secret = secrets.token_hex(32)
        self.address = f"127.0.0.1:{_free_port()}"
        self._forwarder.heard = time.monotonic()
        # What the one before it held is lost with it.
        self._shelf.sweep(all_of_it=True)
        told = self._superlink, self.address.rsplit(":", 1)[1], str(self._shelf.folder)
        return Launch(
            command=[sys.executable, "-P", "-m", "medfl.client.supernode", *told],
            env={
                "FLWR_HOME": str(self._folder / "flwr"),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            },
            first_line=self.secret,
        )


Note = Callable[[Instruction, str], None]


def _unnoted(asked: Instruction, why: str) -> None:
    pass


class Runner:
    """Takes tasks one after another until it is stopped. note: is told what it refuses itself."""

    def __init__(
        self, site: str, node: Node, trainer: Trains, mail: threading.Event, note: Note = _unnoted
    ) -> None:
        self._site, self._node, self._trainer, self._mail = site, node, trainer, mail
        self._note = note
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="runner", daemon=True)

    def start(self) -> None:
        """Start the trainer and the loop."""
        self._trainer.start()
        self._thread.start()

    def stop(self) -> None:
        """End both; a task at work is lost, and its site counts as late."""
        self._stopping.set()
        self._mail.set()
        self._trainer.stop()
        self._thread.join(timeout=10)

    def _loop(self) -> None:
        at, tasks = "", None
        while not self._stopping.is_set():
            if tasks is None or at != self._node.address + self._node.secret:
                at = self._node.address + self._node.secret
                if tasks is not None:
                    tasks.close()
                tasks = self._node.tasks() if at else None
            self._node.check()
            try:
                done = tasks is not None and self._turn(tasks)
            except MedflError as error:
                log.debug("%s", error)
                done = False
            except Exception:
                # A loop that ended would leave a hospital that looks connected and does nothing.
                log.exception("a task could not be handled; the next one is waited for")
                done = False
            if not done:
                self._stopping.wait(0.2)
        if tasks is not None:
            tasks.close()

    def _turn(self, tasks: Tasks) -> bool:
        """Wait for a task and do it. False: the SuperNode could not be asked."""
        task = tasks.next()
        if task is None:
            if not self._mail.wait(_IDLE_S):
                return True
            self._mail.clear()
            until = time.monotonic() + _MAIL_S
            while task is None and time.monotonic() < until and not self._stopping.is_set():
                time.sleep(_BUSY_S)
                task = tasks.next()
        if task is not None:
            self._do(task)
        return True

    def _do(self, task: Task) -> None:
        try:
            asked = task.instruction()
        except FederationError as error:
            task.answer(refusal(self._site, error, 0))
            return
        try:
            if task.bundle != study_bundle(asked.study_digest):
                raise OtherCode("The coordinator sent code with the study; nothing of it was run.")
            digest = asked.study_digest
            reply = self._trainer.do(frame(task.payload(), task.run_id, task.node_id, digest))
        except (OtherCode, TrainerDied) as error:
            log.warning("round=%d refused: %s", asked.round, error)
            try:
                self._note(asked, str(error))
            except MedflError as full:  # the coordinator gets its refusal also then
                log.error("a refusal is not in the audit log: %s", full)
            task.answer(refusal(self._site, error, asked.round))
            return
        task.answer(reply)


@contextmanager
def at_work(
    channel: grpc.Channel,
    session: str,
    folder: Path,
    site: str,
    trainer: Trains,
    note: Note = _unnoted,
) -> Iterator[None]:
    """Forwarder, SuperNode and runner of a site, ended in the order that loses least."""
    forwarder = Forwarder(channel, session)
    node = Node(forwarder, folder)
    runner = Runner(site, node, trainer, forwarder.mail, note)
    node.start(forwarder.start())
    runner.start()
    try:
        yield
    finally:
        node.stop()
        runner.stop()
        forwarder.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
