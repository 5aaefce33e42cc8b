"""The in-process grid: real messages, real workers, and few of them at a time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run

from medfl.common.errors import FederationError
from medfl.common.messages import Envelope, Instruction, Reply, pack
from medfl.server.flower import FlowerSites
from medfl.simulations.grid import LocalGrid, Worker
from medfl.simulations.pool import Pool

ASKED = Instruction(kind="round", study_digest="d", run="main", round=7)


def echo_app() -> ClientApp:
    """Answers as site `s<node>`; node 3 dies, node 4 answers nonsense, node 1 is slow."""
    app = ClientApp()

    @app.train("round")
    def _(message: Message, context: Context) -> Message:
        node = context.node_id
        if node == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if node == 1:
            time.sleep(0.2)
        from medfl.common.flower_records import to_record

        envelope = pack(Reply(site=f"s{node}", round=context.run_id, n_cases=node))
        if node == 4:
            envelope = Envelope('{"patient": "Jane Doe"}')
        return Message(to_record(envelope), reply_to=message)

    return app


@pytest.fixture
def pool() -> Iterator[Pool]:
    worker = Worker(echo_app())
    with Pool(worker.work, 2, keep=worker.keep) as opened:
        yield opened


def to(nodes: Iterable[int]) -> Iterator[tuple[str, Instruction]]:
    return ((str(n), ASKED) for n in nodes)


def test_answers_come_in_the_order_of_the_questions(pool: Pool) -> None:
    sites = FlowerSites(LocalGrid(pool, 5, 9))
    assert sites.names() == [str(n) for n in range(1, 10)]
    replies = list(sites.ask(to([1, 2, 9, 5, 6])))
    assert [r.site for r in replies] == ["s1", "s2", "s9", "s5", "s6"]
    assert {r.round for r in replies} == {5}  # the run's number reached the context


def test_a_site_that_dies_or_talks_nonsense_costs_only_its_own_answer(pool: Pool) -> None:
    replies = list(FlowerSites(LocalGrid(pool, 5, 9)).ask(to([2, 3, 4, 5])))
    assert [(r.site, r.refusal) for r in replies] == [
        ("s2", ""),
        ("3", "node failed"),
        ("4", "damaged answer"),
        ("s5", ""),
    ]


def test_a_slow_site_is_left_out_after_the_deadline(pool: Pool) -> None:
    replies = list(FlowerSites(LocalGrid(pool, 5, 9), deadline_s=0.05).ask(to([1])))
    assert [(r.site, r.refusal) for r in replies] == [("1", "node failed")]


class Counting:
    """A pool that counts how many tasks were given and not yet taken back."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._lock = pool, threading.Lock()
        self.waiting = self.most = 0

    def __len__(self) -> int:
        return len(self._pool)

    def submit(self, task: bytes, common: bytes) -> Future[bytes]:
        with self._lock:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        future = self._pool.submit(task, common)
        real = future.result

        def result(timeout: float | None = None) -> bytes:
            try:
                return real(timeout)
            finally:
                self.waiting -= 1

        future.result = result  # type: ignore[method-assign]
        return future


def test_few_messages_exist_at_a_time(pool: Pool) -> None:
    counting = Counting(pool)
    made = 0

    def questions() -> Iterator[tuple[str, Instruction]]:
        nonlocal made
        for n in range(1, 41):
            if n not in (1, 3, 4):
                made += 1
                yield str(n), ASKED

    grid = LocalGrid(counting, 5, 40)  # type: ignore[arg-type]
    for taken, _ in enumerate(FlowerSites(grid).ask(questions()), start=1):
        assert made - taken <= len(pool)
    assert made == 37
    assert counting.most == len(pool) + 1


def test_each_site_gets_what_it_was_asked_among_sites_that_share_an_instruction() -> None:
    """In turn, so that a worker's content changes under it; node 3 dies with what it had."""
    app = ClientApp()

    @app.train("round")
    def _(message: Message, context: Context) -> Message:
        from medfl.common.flower_records import from_record, to_record
        from medfl.common.messages import unpack_instruction

        asked = unpack_instruction(from_record(message.content))
        if context.node_id == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        told = {"w": 2 * asked.weights["w"]}
        reply = Reply(site=f"s{context.node_id}", round=7, n_cases=len(told["w"]), delta=told)
        return Message(to_record(pack(reply)), reply_to=message)

    worker = Worker(app)
    small = replace(ASKED, weights={"w": np.arange(3, dtype=np.float32)})
    large = replace(ASKED, weights={"w": np.arange(400_000, dtype=np.float32)})
    asked = [small, small, small, large, small, large, large]
    with Pool(worker.work, 1, keep=worker.keep) as pool:
        questions = [(str(n), one) for n, one in enumerate(asked, start=1)]
        replies = list(FlowerSites(LocalGrid(pool, 5, 9)).ask(questions))
    for (node, one), reply in zip(questions, replies, strict=True):
        if node == "3":
            assert reply.refusal == "node failed"
        else:
            np.testing.assert_array_equal(reply.delta["w"], 2 * one.weights["w"])


def test_a_node_that_is_not_there_cannot_be_addressed(pool: Pool) -> None:
    with pytest.raises(FederationError, match="no node 10"):
        list(FlowerSites(LocalGrid(pool, 5, 9)).ask(to([10])))


def test_pushing_and_pulling_works_as_flowers_strategies_use_it(pool: Pool) -> None:
    grid = LocalGrid(pool, 5, 9)
    record = RecordDict({"about": ConfigRecord({"json": pack(ASKED).about})})
    messages = [grid.create_message(record, "train.round", node, "7") for node in (2, 5)]
    ids = list(grid.push_messages(messages))
    replies: list[Message] = []
    end = time.monotonic() + 10
    while len(replies) < 2 and time.monotonic() < end:
        replies += grid.pull_messages(ids)
    assert sorted(m.metadata.src_node_id for m in replies) == [2, 5]
    assert list(grid.pull_messages(ids)) == []
    grid.set_run(Run.create_empty(8))
    assert grid.run.run_id == 8
