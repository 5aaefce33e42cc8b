"""The hospital's executor: its training process, its SuperNode, and who may ask that for tasks."""

from __future__ import annotations

import http.client
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from medfl.client.runner import Node, Runner, Trainer, TrainerDied
from medfl.client.supernode import ShortNaps
from medfl.client.trainer import frame
from medfl.common.child import Child, Launch

# Says "ready", then answers each task with its process id; "die" and "hang" do as they say.
ECHO = """
import os, signal, sys, time
from multiprocessing.connection import Connection
from medfl.common.child import end_with_parent
end_with_parent()
pipe = Connection(int(os.environ["MEDFL_PIPE"]))
pipe.send_bytes(b"ready")
while True:
    task = pipe.recv_bytes()
    if task == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == b"hang":
        time.sleep(60)
    pipe.send_bytes(str(os.getpid()).encode())
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed process whose threads are still ending shows as a zombie and cannot be waited for.
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    return threads > 1 or Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def until(condition, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def echo(tmp_path):
    made = Trainer([sys.executable, "-c", ECHO], tmp_path / "trainer.log", limit_s=1.0)
    made.start()
    yield made
    made.stop()


def test_the_training_process_stays_the_same_between_tasks(echo) -> None:
    first = echo.do(b"a")
    assert echo.do(b"b") == first == str(echo.pid).encode()


def test_a_training_process_that_dies_is_reported_at_once_and_replaced(echo) -> None:
    before = echo.do(b"a")
    started = time.monotonic()
    with pytest.raises(TrainerDied, match="exit code -9"):
        echo.do(b"die")
    assert time.monotonic() - started < 5
    assert echo.do(b"b") != before


def test_a_training_process_that_cannot_be_started_is_tried_again_with_the_next_task(
    echo, tmp_path
) -> None:
    """As on a full disk, where its log cannot be opened."""
    log = tmp_path / "trainer.log"
    log.unlink()
    log.mkdir()
    for _ in range(2):
        with pytest.raises(TrainerDied):
            echo.do(b"die")
    log.rmdir()
    assert echo.do(b"b") == str(echo.pid).encode()


class Moody:
    """Stands for a SuperNode's tasks: the first question ends in an error that nobody expected.

    It stands for the trainer as well, which is never asked.
    """

    def __init__(self) -> None:
        self.address, self.secret, self.asked = "here", "s", 0

    def start(self) -> None:
        pass

    stop = start

    def tasks(self) -> Moody:
        return self

    def next(self) -> None:
        self.asked += 1
        if self.asked == 1:
            raise ZeroDivisionError

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_runner_outlives_an_error_that_nobody_expected() -> None:
    node, mail = Moody(), threading.Event()
    runner = Runner("north", node, node, mail)  # type: ignore[arg-type]
    runner.start()
    try:
        until(lambda: node.asked >= 2)
    finally:
        runner.stop()


def test_a_training_process_that_hangs_is_given_up_and_replaced(echo) -> None:
    before = int(echo.do(b"a"))
    with pytest.raises(TrainerDied):
        echo.do(b"hang")
    assert not alive(before)
    assert int(echo.do(b"b")) != before


def test_a_training_process_that_died_while_idle_costs_nothing(echo) -> None:
    before = int(echo.do(b"a"))
    os.kill(before, signal.SIGKILL)
    until(lambda: not alive(before))
    assert int(echo.do(b"b")) != before


def test_the_training_process_ends_with_its_runner(tmp_path) -> None:
    echo = Trainer([sys.executable, "-c", ECHO], tmp_path / "trainer.log")
    echo.start()
    pid = int(echo.do(b"a"))
    echo.stop()
    assert not alive(pid)


def test_a_trainer_that_cannot_start_is_reported(tmp_path) -> None:
    broken = Trainer([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "trainer.log")
    with pytest.raises(TrainerDied, match="exit code 3"):
        broken.do(b"a")
    broken.stop()


def test_a_process_whose_gpu_failed_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from medfl.client.trainer import gpu_failed

    def synchronize() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    assert not gpu_failed(), "there is none"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_failed()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_failed()


def test_a_task_names_its_run_and_study_before_its_bytes() -> None:
    framed = frame([b"\x00pay", b"load"], 1, 2, "abc")
    size = int.from_bytes(framed[:4], "big")
    assert framed[4 + size :] == b"\x00payload"
    assert framed[4 : 4 + size] == b'{"run_id": 1, "node_id": 2, "study": "abc"}'


def test_naps_are_short_at_first_and_longer_the_longer_nothing_happens(monkeypatch) -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("medfl.client.supernode.time.sleep", sleep)
    naps = ShortNaps(lambda: now[0])
    for _ in range(400):
        naps.sleep(0.5)
    assert slept[0] == 0.03
    assert slept[-1] == 0.5
    assert slept == sorted(slept)
    now[0] += 10  # work was done meanwhile
    naps.sleep(0.5)
    assert slept[-1] == 0.03


# ------------------------------------------------------------------------- supervised children

SLEEPER = "import sys; from medfl.common.child import *; first_line(); end_with_parent(); "
SLEEPER += "import time; time.sleep(60)"


def test_a_child_that_is_killed_comes_back_and_one_that_is_stopped_does_not(tmp_path) -> None:
    child = Child("it", lambda: Launch([sys.executable, "-c", SLEEPER]), tmp_path / "log")
    child.start()
    until(lambda: child.pid is not None)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: child.starts == 2 and child.pid is not None)
    second = child.pid
    assert second is not None
    child.stop()
    assert not alive(second)
    time.sleep(0.8)
    assert child.starts == 2


def test_children_end_when_their_parent_is_killed(tmp_path) -> None:
    """Nobody is left to stop them, so they notice by themselves."""
    parent = (
        "import sys, time; from pathlib import Path; from medfl.common.child import Child, Launch\n"
        f"c = Child('it', lambda: Launch([sys.executable, '-c', {SLEEPER!r}]), Path('log'))\n"
        "c.start()\n"
        "while c.pid is None: time.sleep(0.02)\n"
        "print(c.pid, flush=True); time.sleep(60)"
    )
    import subprocess

    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, cwd=tmp_path, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.5)
        process.kill()
    until(lambda: not alive(pid), 5)


def test_a_launch_does_not_show_its_secret() -> None:
    assert "hush" not in repr(Launch(["x"], first_line="hush", env={"K": "hush"}))


# ------------------------------------------------------------------------------- the SuperNode


class NoTunnel:
    """A forwarder that nothing comes through."""

    def __init__(self) -> None:
        self.mail = threading.Event()
        self.heard = time.monotonic()
        self.silent_s = 0.0


@pytest.mark.slow
def test_the_supernode_gives_tasks_only_to_who_knows_its_secret(tmp_path) -> None:
    from medfl.client.tasks import NodeGone, Tasks

    node = Node(NoTunnel(), tmp_path)
    node.start("127.0.0.1:9")  # nobody there: it keeps trying
    try:

        def asked() -> int:
            host, port = node.address.rsplit(":", 1)
            connection = http.client.HTTPConnection(host, int(port), timeout=5)
            try:
                connection.request(
                    "POST",
                    "/v1/runtime/acquire-task",
                    body=b"",
                    headers={"content-type": "application/protobuf"},
                )
                return connection.getresponse().status
            except OSError:
                return 0
            finally:
                connection.close()

        until(lambda: node.address != "" and asked() != 0, 60)
        assert asked() == 401
        stranger = Tasks(node.address, "another secret")
        with pytest.raises(NodeGone):
            stranger.next()
        stranger.close()
        known = Tasks(node.address, node.secret)
        assert known.next() is None
        known.close()
        # It is not on the command line, in the environment, or in a file.
        pid = node.child.pid
        assert node.secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert node.secret.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        files = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert all(node.secret.encode() not in f.read_bytes() for f in files)
    finally:
        node.stop()


@pytest.mark.slow
def test_a_supernode_that_lives_and_does_nothing_is_replaced(tmp_path) -> None:
    tunnel = NoTunnel()
    node = Node(tunnel, tmp_path)
    node.start("127.0.0.1:9")
    try:
        until(lambda: node.child.pid is not None)
        tunnel.silent_s = 1000.0
        node.check()
        tunnel.silent_s = 0.0
        until(lambda: node.child.starts == 2)
    finally:
        node.stop()
