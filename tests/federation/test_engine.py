"""The real federation: an engine, tunnels and sites, as processes on this machine."""

from __future__ import annotations

import http.client
import io
import os
import signal
import sqlite3
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from medfl.client import tasks
from medfl.common import tensors, tunnel
from medfl.common.bundle import study_bundle
from medfl.common.errors import StorageError
from medfl.common.tunnel import Call
from medfl.server.engine import Engine
from medfl.server.tunnel import Gate
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals


def simulated(world, seed: int = 7):
    hospitals = find_hospitals(world.study, world.folder / "data", world.folder / "cache")
    runs = plan_runs(world.study, hospitals, world.folder / "simulated", [], "cpu")
    return run_all(runs, seed=seed, machine=Machine(workers=1))["main"]


def until(condition, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_federation_ends_with_the_simulators_model_bit_for_bit(small) -> None:
    world = small()
    world.wait()
    outcome = world.engine.run(world.study, seed=7, deadline_s=60)
    assert [r.void for r in outcome.records] == [False] * len(outcome.records)
    expected = simulated(world)
    assert tensors.digest(outcome.weights) == tensors.digest(expected.weights)
    # A round without much training costs little more than its training, from the second on.
    beyond = [r.seconds - max(s["seconds"] for s in r.sites) for r in outcome.records[1:3]]
    assert min(beyond) < 5.0


@pytest.mark.slow
def test_faults_in_a_run_do_not_change_its_model(small) -> None:
    """A SuperNode and then the SuperLink are killed between and in rounds; both come back."""
    world = small(rounds=4, min_sites=2)
    world.wait()
    north, south = world.sites["north"], world.sites["south"]
    killed: list[int] = []

    def on_round(record, weights) -> None:
        if record.round == 1:
            kill(north.node.child.pid)
        elif record.round == 2:
            kill(world.engine.child.pid)
            killed.append(record.round)
        elif record.round == 3:
            # The message is with the SuperNode when that dies: the site is asked again.
            south.slow.write_text("3")
            threading.Timer(2.0, lambda: kill(south.node.child.pid)).start()

    outcome = world.engine.run(world.study, seed=7, deadline_s=120, on_round=on_round)
    assert killed
    assert north.node.child.starts == 2
    assert south.node.child.starts == 2
    assert world.engine.child.starts == 2
    assert [r.left_out for r in outcome.records] == [{}] * len(outcome.records)
    assert tensors.digest(outcome.weights) == tensors.digest(simulated(world).weights)


@pytest.mark.slow
def test_a_trainer_that_dies_costs_its_site_one_round(small) -> None:
    world = small(rounds=3)
    world.wait()
    south = world.sites["south"]
    before = []

    def on_round(record, weights) -> None:
        if record.round == 1:
            before.append(south.trainer.pid)
            south.crash.touch()

    outcome = world.engine.run(world.study, seed=7, deadline_s=120, on_round=on_round)
    left_out = {r.round: r.left_out for r in outcome.records}
    assert left_out[2] == {"south": "training process ended"}
    assert left_out[1] == left_out[3] == {}
    assert outcome.records[1].seconds < 20
    assert south.trainer.pid not in before


@pytest.mark.slow
@pytest.mark.parametrize("failures", [1, 3])
def test_an_answer_that_its_node_does_not_take_is_handed_over_again(
    small, monkeypatch, failures
) -> None:
    """Once by the hospital itself; after three times the coordinator asks again."""
    world = small(rounds=2)
    world.wait()
    left = [failures]
    true = tasks.make_push_object_fn_protobuf

    def flaky(call, node, run_id, session_id):
        if left[0]:
            left[0] -= 1

            def push(object_id: str, content: bytes) -> None:
                raise ObjectPushError(object_id, run_id, session_id)

            return push
        return true(call, node, run_id, session_id)

    monkeypatch.setattr(tasks, "make_push_object_fn_protobuf", flaky)
    records = []
    world.engine.run(
        world.study, seed=7, deadline_s=60, on_round=lambda record, _: records.append(record)
    )
    assert left == [0]
    assert [record.left_out for record in records] == [{}] * len(records)


@pytest.mark.slow
def test_code_in_the_bundle_is_refused_and_never_opened(small, tmp_path) -> None:
    world = small(names=("north",), rounds=1)
    world.wait()
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\n"
    buffer = io.BytesIO(study_bundle(world.study.digest))
    with zipfile.ZipFile(buffer, "a") as archive:
        for name in ("nothing.py", "nothing/__init__.py", "sitecustomize.py", "setup.py"):
            archive.writestr(name, code + "here = None\n")
    with pytest.raises(Exception, match=r"north \(code came with the study\)"):
        world.engine.run(world.study, seed=7, deadline_s=60, bundle=buffer.getvalue())
    assert not canary.exists()
    assert list((world.folder / "data" / "north" / "client").rglob("nothing*")) == []
    # The site is as well as before.
    world.engine.run(world.study, seed=7, deadline_s=60)


@pytest.mark.slow
def test_a_site_that_is_silent_for_the_whole_deadline_is_left_out(small) -> None:
    world = small(rounds=2)
    world.wait()
    south = world.sites["south"]

    def on_round(record, weights) -> None:
        if record.round == 1:
            south.slow.write_text("30")

    started = time.monotonic()
    outcome = world.engine.run(world.study, seed=7, deadline_s=8, on_round=on_round)
    assert outcome.records[1].left_out == {"south": "late"}
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_second_client_of_a_site_waits_while_the_first_lives(small) -> None:
    world = small(names=("north",), rounds=1)
    world.wait()
    from dataclasses import replace

    first = world.sites["north"]
    second = replace(first)
    second.folder = first.folder
    second.start()
    try:
        time.sleep(8)
        node = world.engine.roster.node_of("north")
        world.engine.run(world.study, seed=7, deadline_s=60)
        assert world.engine.roster.node_of("north") == node
        assert first.node.child.starts == 1
    finally:
        second.stop()


def ask(engine: Engine, method: str, path: str, key: str | None = None) -> int:
    host, port = engine.address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        headers = {} if key is None else {"x-medfl-key": key}
        connection.request(method, path, body=b"", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
def test_nobody_on_the_machine_can_call_the_engine_without_its_key(tmp_path) -> None:
    engine = Engine(tmp_path / "coordinator")
    engine.start()
    try:
        for path in (
            "/v1/control/list-runs",
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/register-node",
        ):
            assert ask(engine, "POST", path) == 401
            assert ask(engine, "POST", path, "0" * 64) == 401
        assert ask(engine, "GET", "/docs") == 401
        key = (tmp_path / "coordinator" / "engine.key").read_text()
        assert ask(engine, "GET", "/health", key) == 200
        # Even with the key, a task is only for who can sign with it.
        assert ask(engine, "POST", "/v1/runtime/acquire-task", key) != 200
        assert (tmp_path / "coordinator").stat().st_mode & 0o777 == 0o700
    finally:
        started = time.monotonic()
        engine.stop()
        assert time.monotonic() - started < 12


@pytest.mark.slow
def test_a_call_waits_until_the_engines_database_is_free(tmp_path) -> None:
    """Longer than Flower's own 5 s, after which a claimed message would be lost."""
    engine = Engine(tmp_path / "coordinator")
    engine.start()
    try:
        gate = Gate(engine.address, (engine.folder / "engine.key").read_text(), engine.roster)
        (database,) = engine.folder.glob("*.db")
        body = RegisterNodeFleetRequest(public_key=b"its own").SerializeToString()
        headers = {tunnel.SESSION: "s", "content-type": "application/protobuf"}
        register = Call("1", "/v1/fleet/register-node", headers, body)
        with (
            closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as lock,
            ThreadPoolExecutor(1) as pool,
        ):
            lock.execute("BEGIN EXCLUSIVE")
            answer = pool.submit(gate.answer, "north", register)
            time.sleep(7)
            assert not answer.done()
            lock.execute("ROLLBACK")
            assert answer.result(40).status == 200
        gate.close()
    finally:
        engine.stop()


def test_a_key_that_others_can_read_is_refused(tmp_path) -> None:
    engine = Engine(tmp_path)
    (tmp_path / "engine.key").write_text("a" * 64)
    (tmp_path / "engine.key").chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        engine.start()


@pytest.mark.slow
def test_a_site_that_has_waited_long_is_there_at_once(small) -> None:
    """Longer than the 30 s that a SuperNode waits for an answer that shows no sign of life."""
    world = small(names=("north",), rounds=1)
    world.wait()
    world.engine.run(world.study, seed=7, deadline_s=60)
    time.sleep(35)
    started = time.monotonic()
    world.engine.run(world.study, seed=7, deadline_s=60)
    assert time.monotonic() - started < 10
    log = (world.folder / "data" / "north" / "client" / "supernode.log").read_text()
    assert "retrying" not in log
    assert world.sites["north"].node.child.starts == 1


def test_the_engines_guard_reads_no_more_than_a_call_can_hold(monkeypatch) -> None:
    import asyncio

    from medfl.server import superlink

    monkeypatch.setattr(superlink, "_MAX_BODY", 10)
    seen: list[bytes] = []

    async def app(scope, receive, send) -> None:
        message = await receive()
        assert not message["more_body"]
        seen.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def call(pieces: list[bytes], key: str = "k") -> int:
        messages = [{"type": "http.request", "body": p, "more_body": True} for p in pieces]
        messages.append({"type": "http.request", "body": b"", "more_body": False})
        status: list[int] = []

        async def receive():
            return messages.pop(0)

        async def send(message) -> None:
            if "status" in message:
                status.append(message["status"])

        scope = {"type": "http", "headers": [(b"x-medfl-key", key.encode())]}
        asyncio.run(superlink.guarded(app, "k")(scope, receive, send))
        return status[0]

    assert call([b"abc", b"def"]) == 200
    assert seen == [b"abcdef"]
    assert call([b"abcdef", b"ghijkl"]) == 413
    assert call([b"abc"], key="other") == 401
    assert seen == [b"abcdef"]


@pytest.mark.slow
def test_sites_outlive_a_restart_of_the_coordinator(small) -> None:
    """The same node ids, and no SuperNode has to be started anew."""
    world = small(rounds=1, min_sites=2)
    world.wait()
    before = {n: world.engine.roster.node_of(n) for n in world.names}
    world.engine.run(world.study, seed=7, deadline_s=60)
    world.restart_coordinator()
    world.wait(timeout_s=40)
    assert {n: world.engine.roster.node_of(n) for n in world.names} == before
    outcome = world.engine.run(world.study, seed=7, deadline_s=60)
    assert outcome.records[0].left_out == {}
    assert [s.node.child.starts for s in world.sites.values()] == [1, 1]


@pytest.mark.slow
def test_a_client_that_was_cut_off_without_a_word_rejoins_by_itself(small, monkeypatch) -> None:
    """Its certificate is still in use as far as the coordinator knows: it waits, and gets in."""
    from dataclasses import replace

    monkeypatch.setattr("medfl.server.sessions.LEASE_S", 8.0)
    world = small(names=("north",), rounds=1)
    world.wait()
    first = world.sites["north"]
    kill(first.node.child.pid)
    first.forwarder.stop()  # no goodbye
    first.channel.close()
    second = replace(first)
    second.start()
    try:
        node = world.engine.roster.node_of("north")
        until(lambda: second.forwarder.session == session_of(world, "north"), 40)
        outcome = world.engine.run(world.study, seed=7, deadline_s=60)
        assert outcome.records[0].left_out == {}
        assert world.engine.roster.node_of("north") == node
        assert second.node.child.starts == 1
    finally:
        second.stop()


def session_of(world, site: str) -> str:
    return world.engine._gate._sessions._live[site][0]
