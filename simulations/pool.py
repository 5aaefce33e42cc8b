"""Worker processes that do what they are given, one task at a time, and may die without harm."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from medfl.common.errors import FederationError

log = logging.getLogger(__name__)

Work = Callable[[bytes], bytes]
# What comes before a task says whether something to keep comes first.
_KEEP, _TASK = b"k", b"t"
# Results up to this size lie in memory that both processes see, which is several times faster than
# a socket; of what is not written to, the system sets nothing aside.
_ROOM = 2**24


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A copy of this process does `work` and ends; yields its id, and waits for it afterwards."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            # Not exit: what the parent registered for its end is the parent's.
            os._exit(0)
    try:
        yield child
    finally:
        os.waitpid(child, 0)


class WorkerDied(FederationError):
    """The process that did a task ended before it answered."""


class PoolClosed(FederationError):
    """The pool was closed while a task waited: the whole simulation is ending."""


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    room: mmap
    kept: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Given:
    task: bytes
    common: bytes | None
    future: Future[bytes]


class Pool:
    """`workers` processes forked from this one, so that nothing is imported twice.

    Fork before torch computes anything here: a forked process inherits modules, not threads. Tasks
    are bytes; nothing is pickled. A worker that dies costs its task (WorkerDied) and is replaced.
    keep: given in a worker what `submit` says that tasks have in common, None before the next.
    """

    def __init__(
        self,
        work: Work,
        workers: int,
        start: Callable[[], None] = lambda: None,
        keep: Callable[[bytes | None], None] = lambda common: None,
    ) -> None:
        self._work, self._start, self._keep = work, start, keep
        self._context = mp.get_context("fork")
        self._tasks: queue.SimpleQueue[_Given | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._forking = threading.Lock()
        self._workers: dict[int, _Worker] = {}
        for i in range(workers):
            self._workers[i] = self._fork()
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"pool-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._threads)

    def submit(self, task: bytes, common: bytes | None = None) -> Future[bytes]:
        """Do `task` in the next free worker. The future raises WorkerDied or PoolClosed.

        common: the same object for tasks that have it in common; a worker gets it once.
        """
        future: Future[bytes] = Future()
        self._tasks.put(_Given(task, common, future))
        if self._closing.is_set():
            self._drain()
        return future

    def close(self) -> None:
        """End all workers at once; unfinished tasks are lost."""
        self._closing.set()
        for worker in list(self._workers.values()):
            worker.process.terminate()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        self._drain()
        for worker in list(self._workers.values()):
            worker.process.terminate()  # again: one may have been forked meanwhile
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            worker.room.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _drain(self) -> None:
        """Nobody may wait for ever for what nobody will do."""
        farewells = 0
        while True:
            try:
                item = self._tasks.get_nowait()
            except queue.Empty:
                break
            if item is None:
                farewells += 1
            elif item.future.set_running_or_notify_cancel():
                item.future.set_exception(PoolClosed("the simulation has ended"))
        for _ in range(farewells):
            self._tasks.put(None)  # meant for the threads, which end by them

    def _fork(self) -> _Worker:
        with self._forking:
            (ours, theirs), room = self._context.Pipe(), mmap(-1, _ROOM)
            # A child that held other workers' pipes would keep them open after this process died.
            not_its_own = [ours, *(w.pipe for w in self._workers.values())]
            process = self._context.Process(
                target=_loop,
                args=(theirs, room, not_its_own, self._work, self._start, self._keep),
                daemon=True,
            )
            process.start()
            theirs.close()
        return _Worker(process, ours, room)

    def _serve(self, number: int) -> None:
        while (given := self._tasks.get()) is not None:
            future = given.future
            if not future.set_running_or_notify_cancel():
                continue
            worker = self._workers[number]
            try:
                if given.common is not None and worker.kept is not given.common:
                    worker.pipe.send_bytes(_KEEP)
                    worker.pipe.send_bytes(given.common)
                    worker.kept = given.common
                worker.pipe.send_bytes(_TASK)
                worker.pipe.send_bytes(given.task)
                future.set_result(_taken(worker.pipe, worker.room))
            except (EOFError, OSError):
                if self._closing.is_set():
                    future.set_exception(PoolClosed("the simulation has ended"))
                    continue
                code = self._replace(number, worker)
                future.set_exception(WorkerDied(f"a worker process ended (exit code {code})"))

    def _replace(self, number: int, dead: _Worker) -> int | None:
        """Bury a worker and fork its successor; returns the exit code."""
        dead.process.join(timeout=1)
        if dead.process.is_alive():
            dead.process.kill()
            dead.process.join()
        code = dead.process.exitcode
        log.warning("a worker process ended (exit code %s); it is replaced", code)
        dead.pipe.close()
        dead.room.close()
        try:
            self._workers[number] = self._fork()
        except OSError as error:
            # The dead one's pipe fails the next task as well, and that tries again.
            log.warning("no process could be started: %s", error.strerror)
        return code


def _handed_over(pipe: Connection, room: mmap, result: bytes) -> None:
    """Raises BrokenPipeError where nobody waits for it any more."""
    lies_there = len(result) <= len(room)
    if lies_there:
        room[: len(result)] = result
    pipe.send_bytes(str(len(result)).encode())
    if not lies_there:
        pipe.send_bytes(result)


def _taken(pipe: Connection, room: mmap) -> bytes:
    size = int(pipe.recv_bytes())
    return room[:size] if size <= len(room) else pipe.recv_bytes()


def _loop(
    pipe: Connection,
    room: mmap,
    not_its_own: list[Connection],
    work: Work,
    start: Callable[[], None],
    keep: Callable[[bytes | None], None],
) -> None:
    # Ctrl-C reaches the whole terminal group; the parent decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in not_its_own:
        other.close()
    start()
    while True:
        try:
            if pipe.recv_bytes() == _KEEP:
                keep(None)
                keep(pipe.recv_bytes())
                continue
            task = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        result = work(task)
        try:
            _handed_over(pipe, room, result)
        except BrokenPipeError:
            os._exit(0)  # whoever asked is gone
