"""Worker processes may die, be closed in the middle or lose their parent; nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

import pytest

from medfl.simulations.pool import Pool, PoolClosed, WorkerDied


def work(task: bytes) -> bytes:
    """What a task says: its worker's number, death, sleep, an error, or itself again."""
    if task == b"pid":
        return str(os.getpid()).encode()
    if task == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.startswith(b"sleep"):
        time.sleep(float(task[5:]))
    if task == b"raise":
        os.close(2)  # the traceback is expected, and nobody wants to read it
        raise ValueError("in a worker")
    return task


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(work, 2) as opened:
        yield opened


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def children() -> set[int]:
    """Processes whose parent is this one, zombies included."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="ascii") as file:
                    if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                        found.add(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def pids(pool: Pool, n: int = 8) -> set[int]:
    return {int(f.result(10)) for f in [pool.submit(b"pid") for _ in range(n)]}


def test_tasks_come_back_as_they_were_given(pool: Pool) -> None:
    tasks = [os.urandom(size) for size in (0, 1, 70_000, 3_000_000, 20_000_000)]
    assert [pool.submit(t).result(10) for t in tasks] == tasks
    assert len(pool) == 2


def test_a_killed_worker_costs_its_task_and_is_replaced(pool: Pool) -> None:
    lost = pool.submit(b"die")
    kept = [pool.submit(b"%d" % i) for i in range(20)]
    with pytest.raises(WorkerDied, match="exit code -9"):
        lost.result(10)
    assert [f.result(10) for f in kept] == [b"%d" % i for i in range(20)]


def test_what_tasks_have_in_common_goes_to_a_worker_once_and_to_its_successor_again() -> None:
    kept: list[bytes | None] = []

    def said(task: bytes) -> bytes:
        return work(task) if task == b"die" else repr(kept).encode()

    with Pool(said, 1, keep=kept.append) as pool:
        one, other = b"one", b"other"
        tasks = [(b"x", None), (b"x", one), (b"x", one), (b"x", None), (b"x", other), (b"die", one)]
        told = [pool.submit(*task) for task in tasks]
        after = pool.submit(b"x", one)
        assert [literal_eval(f.result(10).decode()) for f in told[:5]] == [
            [],
            [None, one],
            [None, one],
            [None, one],
            [None, one, None, other],
        ]
        assert isinstance(told[5].exception(10), WorkerDied)
        assert literal_eval(after.result(10).decode()) == [None, one]


def test_every_worker_may_die_again_and_again(pool: Pool) -> None:
    for _ in range(3):
        lost = [pool.submit(b"die") for _ in range(4)]
        assert all(isinstance(f.exception(10), WorkerDied) for f in lost)
    assert pool.submit(b"there").result(10) == b"there"


def test_an_error_in_a_worker_costs_its_task(pool: Pool) -> None:
    with pytest.raises(WorkerDied, match="exit code 1"):
        pool.submit(b"raise").result(10)
    assert pool.submit(b"there").result(10) == b"there"


def test_nothing_is_left_of_a_closed_pool() -> None:
    before = children()
    with Pool(work, 2) as opened:
        first = pids(opened)
        opened.submit(b"die").exception(10)
        first |= pids(opened)
        assert len(first) >= 2
    assert children() - before == set()
    assert not any(alive(pid) for pid in first)


def test_closing_does_not_wait_for_tasks() -> None:
    opened = Pool(work, 2)
    futures = [opened.submit(b"sleep60") for _ in range(5)]
    time.sleep(0.2)
    start = time.monotonic()
    opened.close()
    assert time.monotonic() - start < 4
    assert not wait(futures, timeout=5).not_done
    assert all(isinstance(f.exception(), PoolClosed) for f in futures)


def test_a_task_given_to_a_closed_pool_fails_at_once() -> None:
    opened = Pool(work, 1)
    opened.close()
    with pytest.raises(PoolClosed):
        opened.submit(b"late").result(5)
    opened.close()  # twice does no harm


def test_closing_while_workers_die_leaves_nothing() -> None:
    before = children()
    for _ in range(5):
        opened = Pool(work, 2)
        futures: list[Future[bytes]] = [opened.submit(b"die") for _ in range(20)]
        time.sleep(0.05)
        opened.close()
        assert not wait(futures, timeout=5).not_done
    assert children() - before == set()


def test_a_process_that_cannot_be_forked_loses_tasks_and_no_more(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool._fork

    def refused() -> object:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pool, "_fork", refused)
    assert isinstance(pool.submit(b"die").exception(10), WorkerDied)
    assert isinstance(pool.submit(b"die").exception(10), WorkerDied)
    monkeypatch.setattr(pool, "_fork", real)
    # Both workers are gone; the next tasks bring them back.
    for _ in range(6):
        pool.submit(b"x").exception(10)
    assert pool.submit(b"there").result(10) == b"there"


def test_workers_ignore_ctrl_c(pool: Pool) -> None:
    for pid in pids(pool):
        os.kill(pid, signal.SIGINT)
    assert pool.submit(b"there").result(10) == b"there"


PARENT = """
import os, sys, time
from medfl.simulations.pool import Pool

def work(task):
    if task == b"pid":
        time.sleep(0.2)
        return str(os.getpid()).encode()
    time.sleep(1.0)
    return task

pool = Pool(work, 3)
found = {int(f.result()) for f in [pool.submit(b"pid") for _ in range(6)]}
pool.submit(b"busy")
print(*found, flush=True)
time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stderr is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 3
    parent.kill()
    parent.wait()
    assert until(lambda: not any(alive(pid) for pid in workers))
    assert parent.stderr.read() == ""  # the busy one ended quietly, too
    parent.stdout.close()
    parent.stderr.close()


def test_tasks_that_come_while_a_pool_closes_do_not_keep_its_threads() -> None:
    pool = Pool(lambda task: task, workers=2)
    closing = threading.Thread(target=pool.close)
    closing.start()
    refused = 0
    while closing.is_alive():
        refused += isinstance(pool.submit(b"x").exception(timeout=10), PoolClosed)
    assert refused
    assert [t.name for t in threading.enumerate() if t.name.startswith("pool-")] == []
