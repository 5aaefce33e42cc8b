"""The tunnel: what passes, who may say what, and that a cut line is no bad answer."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.client.tunnel import Forwarder, owner_of
from medfl.common import tunnel
from medfl.common.errors import FederationError
from medfl.common.shelf import LARGE, Shelf, ticket
from medfl.common.tunnel import ALLOWED, Answer, Call, decode_answer, decode_call, encode
from medfl.server.register import Roster
from medfl.server.room import Room
from medfl.server.tunnel import Gate, fleet_handlers

FLEET = "/v1/fleet/"
KEY = "k" * 64


def test_a_call_and_an_answer_come_out_as_they_went_in() -> None:
    call = Call("7", FLEET + "get-run", {"accept": "x"}, b"\x00\xffbody")
    assert decode_call(encode(call)) == call
    assert decode_answer(encode(Answer(200, {}, b"abc"))) == Answer(200, {}, b"abc")


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused_and_never_crashes_the_decoder(raw: bytes) -> None:
    for decode in (decode_call, decode_answer):
        with pytest.raises(FederationError):
            decode(raw)


@pytest.mark.parametrize(
    "head",
    [
        b'{"status": 200}',
        b'{"status": true, "headers": {}}',
        b'{"status": 99, "headers": {}}',
        b'{"status": 200, "headers": {"a": 1}}',
        b'{"status": 200, "headers": {}, "more": 1}',
        b"[]",
    ],
)
def test_an_answer_of_another_form_is_refused(head: bytes) -> None:
    with pytest.raises(FederationError):
        decode_answer(len(head).to_bytes(4, "big") + head)


class SuperLinkStandIn:
    """Answers fleet calls as a SuperLink of one node does; `plan` overrides by call's name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.plan: dict[str, Callable[[bytes], tuple[int, bytes]]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                name = self.path.rsplit("/", 1)[1]
                outer.calls.append((name, {k.lower(): v for k, v in self.headers.items()}, body))
                status, answer = outer.plan.get(name, outer.usual(name))(body)
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def usual(self, name: str) -> Callable[[bytes], tuple[int, bytes]]:
        if name == "activate-node":
            return lambda body: (
                200,
                fleet_pb2.ActivateNodeResponse(node_id=11).SerializeToString(),
            )
        if name == "send-node-heartbeat":
            known = heartbeat_pb2.SendNodeHeartbeatResponse(success=True).SerializeToString()
            return lambda body: (200, known)
        return lambda body: (200, b"")

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


@pytest.fixture
def superlink() -> Iterator[SuperLinkStandIn]:
    made = SuperLinkStandIn()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def gate(superlink: SuperLinkStandIn) -> Iterator[Gate]:
    made = Gate(superlink.address, KEY, Roster())
    yield made
    made.close()


def call(name: str, body: bytes = b"", id: str = "1", session: str = "s") -> Call:
    return Call(id, FLEET + name, {tunnel.SESSION: session}, body)


def activate(gate: Gate, site: str = "north", session: str = "s") -> Answer:
    body = fleet_pb2.ActivateNodeRequest(public_key=b"its own").SerializeToString()
    return gate.answer(site, call("activate-node", body, id=f"{site}{session}", session=session))


def pull(node_id: int = 11, id: str = "p") -> Call:
    return call(
        "pull-messages",
        fleet_pb2.PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString(),
        id=id,
    )


def one_message() -> tuple[int, bytes]:
    answer = fleet_pb2.PullMessagesResponse()
    answer.messages_list.add().metadata.message_id = "m"
    return 200, answer.SerializeToString()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/docs",
        "/health",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/",
        "/v1/fleet/pull-messages?x",
    ],
)
def test_only_a_supernodes_own_calls_pass(gate: Gate, superlink, path: str) -> None:
    assert gate.answer("north", Call("1", path, {}, b"")).status == 404
    assert superlink.calls == []


@pytest.mark.parametrize("path", ALLOWED)
def test_a_body_above_the_cap_does_not_reach_the_engine(gate: Gate, superlink, path: str) -> None:
    too_large = Call("1", path, {tunnel.SESSION: "s"}, b"\0" * (ALLOWED[path] + 1))
    assert gate.answer("north", too_large).status == 413
    assert superlink.calls == []


def test_the_gateway_signs_with_the_sites_own_key(gate: Gate, superlink) -> None:
    """What the SuperNode says of its key and its clock does not get through."""
    activate(gate)
    activate(gate, "south")
    keys = [fleet_pb2.ActivateNodeRequest.FromString(b).public_key for _, _, b in superlink.calls]
    assert len(set(keys)) == 2
    assert b"its own" not in keys
    headers = superlink.calls[0][1]
    assert headers["x-medfl-key"] == KEY
    assert headers["flwr-signature"]


def speaking_for(node_id: int) -> list[Call]:
    node = Node(node_id=node_id)
    push = fleet_pb2.PushMessagesRequest(node=Node(node_id=11))
    push.messages_list.add().metadata.src_node_id = node_id
    requests = {
        "pull-messages": fleet_pb2.PullMessagesRequest(node=node),
        "push-messages": push,
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(node=node),
        "push-object": message_pb2.PushObjectRequest(node=node),
        "pull-object": message_pb2.PullObjectRequest(node=node),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(node=node),
        "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=node_id),
        "unregister-node": fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id),
    }
    return [call(name, r.SerializeToString(), id=name) for name, r in requests.items()]


@pytest.mark.parametrize("number", range(8))
def test_a_site_cannot_speak_for_anothers_node(gate: Gate, superlink, number: int) -> None:
    activate(gate)
    superlink.calls.clear()
    assert gate.answer("north", speaking_for(12)[number]).status == 401
    assert superlink.calls == []


def test_garbage_in_a_body_is_refused(gate: Gate, superlink) -> None:
    activate(gate)
    with pytest.raises(FederationError, match="malformed"):
        gate.answer("north", call("push-messages", b"\xff\xff\xff", id="x"))
    assert superlink.names() == ["activate-node"]


def test_a_repeated_call_takes_effect_once(gate: Gate, superlink) -> None:
    """The answer got lost on the way, so the site asks again with the same id."""
    activate(gate)
    superlink.plan["pull-messages"] = lambda body: one_message()
    first = gate.answer("north", pull(id="a"))
    assert gate.answer("north", pull(id="a")) == first
    assert superlink.names().count("pull-messages") == 1
    gate.answer("north", pull(id="b"))
    assert superlink.names().count("pull-messages") == 2


def test_an_engine_that_fails_is_a_reason_to_try_again(gate: Gate, superlink) -> None:
    activate(gate)
    superlink.plan["pull-messages"] = lambda body: (500, b"secret details")
    assert gate.answer("north", pull(id="a")) == Answer(503)
    superlink.plan["pull-messages"] = lambda body: one_message()
    assert gate.answer("north", pull(id="a")).status == 200


def test_a_node_that_flower_still_believes_in_is_activated_all_the_same(gate, superlink) -> None:
    """A SuperNode that was killed and is back at once would be refused for a minute."""
    activate(gate)
    online = [True]

    def activation(body: bytes) -> tuple[int, bytes]:
        if online[0]:
            return 412, b"still online"
        return 200, fleet_pb2.ActivateNodeResponse(node_id=11).SerializeToString()

    def deactivation(body: bytes) -> tuple[int, bytes]:
        online[0] = False
        return 200, b""

    superlink.plan |= {"activate-node": activation, "deactivate-node": deactivation}
    body = fleet_pb2.ActivateNodeRequest(public_key=b"another").SerializeToString()
    assert gate.answer("north", call("activate-node", body, id="again")).status == 200


def test_one_session_a_site_and_a_second_waits_until_it_is_silent(gate, superlink, monkeypatch):
    activate(gate, session="first")
    assert activate(gate, session="second").status == 503
    assert gate.answer("north", call("pull-messages", session="second")).status == 401
    monkeypatch.setattr("medfl.server.sessions.LEASE_S", 0.0)
    assert activate(gate, session="second").status == 200


def test_a_pull_is_held_until_the_sites_own_bell_rings(superlink) -> None:
    roster = Roster()
    gate = Gate(superlink.address, KEY, roster)
    activate(gate)
    there = threading.Event()
    superlink.plan["pull-messages"] = lambda body: one_message() if there.is_set() else (200, b"")
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(gate.answer("north", pull())))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    there.set()
    # What goes to others, or comes from them, makes nobody look who waits for himself.
    roster.post("south")
    roster.ring()
    time.sleep(0.3)
    assert [name for name, *_ in superlink.calls].count("pull-messages") == 1
    rang = time.monotonic()
    roster.post("north")
    thread.join(timeout=3)
    assert time.monotonic() - rang < 1.0
    assert answers[0].body == one_message()[1]
    gate.close()


def test_what_a_supernode_took_with_it_is_known_to_be_lost() -> None:
    roster = Roster()
    roster.arrived("north", 11)
    roster.gave("north", ["a", "b"])
    roster.got("north", ["a"])
    assert not roster.was_lost("b")
    roster.arrived("north", 11)
    assert not roster.was_lost("a")
    assert roster.was_lost("b")
    assert not roster.was_lost("b")


def test_a_question_that_went_down_with_the_superlink_is_known_to_be_lost(superlink) -> None:
    """It was handed to a pull whose answer nobody got; the next SuperLink has no more of it."""
    roster = Roster()
    gate = Gate(superlink.address, KEY, roster)
    activate(gate)

    def dies(body: bytes) -> tuple[int, bytes]:
        superlink.plan["pull-messages"] = lambda body: (200, b"")
        raise ConnectionError

    superlink.plan["pull-messages"] = dies
    roster.post("north", "question")
    roster.post("south", "another")
    gate.answer("north", pull(), active=lambda: False)
    assert roster.was_lost("question")
    assert not roster.was_lost("another")
    gate.close()


def test_a_question_that_comes_at_the_second_try_is_not_lost(superlink) -> None:
    roster = Roster()
    gate = Gate(superlink.address, KEY, roster)
    activate(gate)

    def dies(body: bytes) -> tuple[int, bytes]:
        superlink.plan["pull-messages"] = lambda body: one_message()
        raise ConnectionError

    superlink.plan["pull-messages"] = dies
    roster.post("north", "question")
    assert gate.answer("north", pull()).body == one_message()[1]
    assert not roster.was_lost("question")
    gate.close()


def test_a_question_that_was_brought_is_not_lost_by_a_later_pull() -> None:
    roster = Roster()
    roster.arrived("north", 11)
    roster.post("north", "a")
    roster.gave("north", ["a"])
    roster.broke_off("north")
    assert not roster.was_lost("a")


def test_an_answer_whose_supernode_is_gone_will_not_be_completed() -> None:
    roster = Roster()
    roster.arrived("north", 11)
    roster.gave("north", ["a"])
    roster.got("north", ["a"])
    assert not roster.was_broken("a"), "its parts may be on their way"
    roster.arrived("north", 11)
    assert roster.was_broken("a")
    assert not roster.was_lost("a"), "it may be whole, and then it counts"


def test_a_site_is_away_since_it_was_heard_or_since_the_start(monkeypatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("medfl.server.register.time.monotonic", lambda: clock[0])
    roster = Roster()
    roster.arrived("north", 11)
    clock[0] += 70
    assert (roster.away_s("north"), roster.away_s("south")) == (0.0, 70.0)
    clock[0] += 30
    assert (roster.away_s("north"), roster.away_s("south")) == (100.0, 100.0)
    roster.heard("north", 11)
    roster.gave("north", ["a"])
    assert roster.away_s("north") == 0.0
    assert roster.at_work()
    clock[0] += 10
    roster.left("north")
    assert roster.away_s("north") == 10.0
    assert not roster.at_work()


class Far:
    """A gateway with the tunnel, on a port that stays the same when it is started again."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(8), options=tunnel.GRPC_OPTIONS)
        self._server.add_generic_rpc_handlers([fleet_handlers(self._gate, lambda c: "north")])
        assert self._server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()


@pytest.fixture
def line(gate: Gate) -> Iterator[tuple[Far, Forwarder, str]]:
    far = Far(gate)
    options = [*tunnel.GRPC_OPTIONS, ("grpc.max_reconnect_backoff_ms", 500)]
    with grpc.insecure_channel(f"127.0.0.1:{far.port}", options=options) as channel:
        forwarder = Forwarder(channel)
        address = forwarder.start()
        yield far, forwarder, address
        forwarder.stop()
    far.stop()


def post(address: str, name: str, body: bytes, path: str = FLEET) -> tuple[int, bytes]:
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=40)
    try:
        connection.request("POST", path + name, body=body)
        got = connection.getresponse()
        return got.status, got.read()
    finally:
        connection.close()


def activation() -> bytes:
    return fleet_pb2.ActivateNodeRequest(public_key=b"x").SerializeToString()


def test_a_call_waits_while_the_line_is_cut(line, superlink) -> None:
    far, _, address = line
    assert post(address, "activate-node", activation())[0] == 200
    far.stop()
    got: list[tuple[int, bytes]] = []
    thread = threading.Thread(
        target=lambda: got.append(post(address, "pull-messages", pull().body))
    )
    superlink.plan["pull-messages"] = lambda body: one_message()
    thread.start()
    time.sleep(1.5)
    assert got == []
    far.start()
    thread.join(timeout=20)
    assert got == [one_message()]


def test_a_message_that_is_no_longer_fetched_is_given_up(line, superlink, monkeypatch) -> None:
    """A SuperNode forgets a message whose run ends while it fetches it, and never says so."""
    far, forwarder, address = line
    clock = [1000.0]
    monkeypatch.setattr("medfl.client.tunnel._Fetch.clock", staticmethod(lambda: clock[0]))
    assert post(address, "activate-node", activation())[0] == 200
    superlink.plan["pull-messages"] = lambda body: one_message()
    clock[0] += 500
    post(address, "pull-messages", pull().body)
    assert not forwarder.has_given_up, "it has just been announced"
    far.stop()
    body = message_pb2.PullObjectRequest(node=Node(node_id=11)).SerializeToString()
    fetching = threading.Thread(target=lambda: post(address, "pull-object", body))
    fetching.start()
    time.sleep(0.5)
    clock[0] += 500
    assert not forwarder.has_given_up, "the line is cut, and it waits"
    superlink.plan["pull-object"] = lambda body: (403, b"")
    far.start()
    fetching.join(timeout=20)
    assert not forwarder.has_given_up
    clock[0] += 3
    assert forwarder.has_given_up


@pytest.mark.parametrize(("status", "given"), [(404, 401), (412, 401), (401, 401), (403, 403)])
def test_a_supernode_gets_only_answers_that_it_understands(line, superlink, status, given) -> None:
    _, _, address = line
    post(address, "activate-node", activation())
    superlink.plan["get-run"] = lambda body: (status, b"")
    body = pull().body
    assert post(address, "get-run", body)[0] == given


def test_a_heartbeat_that_fails_may_be_repeated(line, superlink) -> None:
    """Any other answer would end the thread that sends them."""
    far, _, address = line
    post(address, "activate-node", activation())
    body = heartbeat_pb2.SendNodeHeartbeatRequest(node=Node(node_id=11)).SerializeToString()
    assert post(address, "send-node-heartbeat", body)[0] == 200
    superlink.plan["send-node-heartbeat"] = lambda body: (412, b"")
    assert post(address, "send-node-heartbeat", body)[0] == 503
    # Either of these would end the SuperNode's heartbeats for good.
    superlink.plan["send-node-heartbeat"] = lambda body: (200, b"\xff\xfe no protobuf")
    assert post(address, "send-node-heartbeat", body)[0] == 503
    superlink.plan["send-node-heartbeat"] = lambda body: (200, b"")  # success = false
    assert post(address, "send-node-heartbeat", body)[0] == 401
    far.stop()
    started = time.monotonic()
    assert post(address, "send-node-heartbeat", body)[0] == 503
    assert time.monotonic() - started < 5
    far.start()


def test_the_forwarder_lets_nothing_else_out(line, superlink) -> None:
    _, _, address = line
    assert post(address, "list-runs", b"", path="/v1/control/")[0] == 404
    assert post(address, "pull-messages", b"\0" * 5000)[0] == 413
    assert superlink.calls == []


def test_a_pull_of_a_dead_supernode_takes_no_message_with_it(line, superlink, gate) -> None:
    _, _, address = line
    post(address, "activate-node", activation())
    host, port = address.rsplit(":", 1)
    dead = http.client.HTTPConnection(host, int(port), timeout=40)
    dead.request("POST", FLEET + "pull-messages", body=pull().body)
    time.sleep(0.5)
    dead.close()
    time.sleep(2.5)  # noticed
    superlink.plan["pull-messages"] = lambda body: one_message()
    before = superlink.names().count("pull-messages")
    assert post(address, "pull-messages", pull().body) == one_message()
    assert superlink.names().count("pull-messages") == before + 1


def test_another_user_of_the_machine_cannot_use_the_tunnel(line, superlink, monkeypatch) -> None:
    _, _, address = line
    assert post(address, "activate-node", activation())[0] == 200
    monkeypatch.setattr("medfl.client.tunnel.os.geteuid", lambda: 12345)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        post(address, "activate-node", activation())
    assert superlink.names() == ["activate-node"]


def test_the_owner_of_a_connection_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = server.getsockname()
        with socket.create_connection(own) as client, server.accept()[0]:
            assert owner_of(client.getsockname(), own) == os.geteuid()
            assert owner_of(("127.0.0.1", 1), own) is None


CHUNK = b"ArrayChunk  300000\x00" + bytes(300_000)
OBJECT = hashlib.sha256(CHUNK).hexdigest()


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / "objects")


@pytest.fixture
def keeper(superlink, shelf) -> Iterator[Gate]:
    """A gate whose SuperLink gives message "m" to north alone and keeps large objects as files."""
    made = Gate(superlink.address, KEY, Roster(), shelf=shelf)
    given = fleet_pb2.PullMessagesResponse()
    given.messages_list.add().metadata.message_id = "m"
    given.message_object_trees.add(object_id="m").children.add(object_id=OBJECT)
    superlink.plan["pull-messages"] = lambda body: (200, given.SerializeToString())
    there = message_pb2.PullObjectResponse(
        object_found=True, object_available=True, object_content=ticket(OBJECT)
    )
    superlink.plan["pull-object"] = lambda body: (200, there.SerializeToString())
    lacking = fleet_pb2.PushMessagesResponse(objects_to_push=[OBJECT])
    superlink.plan["push-messages"] = lambda body: (200, lacking.SerializeToString())
    stored = message_pb2.PushObjectResponse(stored=True).SerializeToString()
    superlink.plan["push-object"] = lambda body: (200, stored)
    for site in ("north", "south"):
        activate(made, site)
    made.answer("north", pull())
    yield made
    made.close()


def fetch(object_id: str = OBJECT) -> Call:
    request = message_pb2.PullObjectRequest(node=Node(node_id=11), object_id=object_id)
    return call("pull-object", request.SerializeToString())


def send(content: bytes, object_id: str = OBJECT) -> Call:
    request = message_pb2.PushObjectRequest(
        node=Node(node_id=11), object_id=object_id, object_content=content, session_id="7"
    )
    return call("push-object", request.SerializeToString())


def announce(gate: Gate, site: str) -> None:
    body = fleet_pb2.PushMessagesRequest(node=Node(node_id=11)).SerializeToString()
    assert gate.answer(site, call("push-messages", body, id="a")).status == 200


def content_of(answer: Answer) -> bytes:
    return message_pb2.PullObjectResponse.FromString(answer.body + answer.more).object_content


def was_stored(answer: Answer) -> bool:
    return message_pb2.PushObjectResponse.FromString(answer.body).stored


def test_a_site_fetches_the_objects_of_its_own_messages_only(keeper, superlink, shelf) -> None:
    shelf.lay(OBJECT, CHUNK)
    shelf.keep(OBJECT)
    assert keeper.answer("south", fetch()).status == 403
    assert keeper.answer("north", fetch("f" * 64)).status == 403
    assert "pull-object" not in superlink.names()
    for _ in range(2):
        assert content_of(keeper.answer("north", fetch())) == CHUNK
    confirmation = message_pb2.ConfirmMessageReceivedRequest(
        node=Node(node_id=11), message_object_id="m"
    )
    keeper.answer("north", call("confirm-message-received", confirmation.SerializeToString()))
    assert keeper.answer("north", fetch()).status == 403


def test_a_run_that_is_over_lets_nobody_fetch_on(keeper, superlink, shelf, monkeypatch) -> None:
    """The file may lie there still; the SuperLink's word counts, and is asked for every second."""
    shelf.lay(OBJECT, CHUNK)
    shelf.keep(OBJECT)
    monkeypatch.setattr("medfl.server.parcels._ALIVE_S", 0.0)
    assert keeper.answer("north", fetch()).status == 200
    superlink.plan["pull-object"] = lambda body: (403, b"")
    assert keeper.answer("north", fetch()).status == 403


def test_a_file_that_is_lost_is_still_to_come(keeper, monkeypatch) -> None:
    monkeypatch.setattr("medfl.server.parcels._COMING_S", 0.1)
    got = message_pb2.PullObjectResponse.FromString(keeper.answer("north", fetch()).body)
    assert (got.object_found, got.object_available) == (True, False)


def test_a_site_sends_what_it_was_asked_for_only(keeper, superlink, shelf) -> None:
    assert keeper.answer("north", send(CHUNK)).status == 403
    announce(keeper, "north")
    assert keeper.answer("south", send(CHUNK)).status == 403
    other = CHUNK[:-1] + b"x"
    assert keeper.answer("north", send(other, hashlib.sha256(other).hexdigest())).status == 403
    assert not was_stored(keeper.answer("north", send(other)))
    assert not was_stored(keeper.answer("north", send(ticket(OBJECT))))
    assert "push-object" not in superlink.names()
    assert list(shelf.folder.iterdir()) == []


def test_an_object_that_was_asked_for_is_laid_and_its_ticket_sent_once(keeper, superlink, shelf):
    announce(keeper, "north")
    for _ in range(2):
        assert was_stored(keeper.answer("north", send(CHUNK)))
    sent = [body for name, _, body in superlink.calls if name == "push-object"]
    (request,) = (message_pb2.PushObjectRequest.FromString(body) for body in sent)
    assert (request.object_content, request.session_id) == (ticket(OBJECT), "7")
    laid = shelf.laid(OBJECT)
    assert laid is not None
    assert laid.read_bytes() == CHUNK


def test_nothing_stays_of_an_object_that_the_superlink_does_not_take(keeper, superlink, shelf):
    announce(keeper, "north")
    superlink.plan["push-object"] = lambda body: (403, b"")
    assert keeper.answer("north", send(CHUNK)).status == 403
    assert list(shelf.folder.iterdir()) == []


# --- room for large objects ---------------------------------------------------------------------


class Held:
    """Of a gRPC context: what is to happen when the call is over."""

    def __init__(self) -> None:
        self._after: list[Callable[[], None]] = []

    def add_callback(self, after: Callable[[], None]) -> bool:
        self._after.append(after)
        return True

    def end(self) -> None:
        for after in self._after:
            after()


def test_a_third_object_waits_until_one_of_two_has_gone(monkeypatch) -> None:
    monkeypatch.setattr("medfl.server.room._FAST_S", 60.0)
    room, calls = Room(2), [Held(), Held(), Held()]
    room.take(calls[0])
    room.take(calls[1])
    third = threading.Thread(target=room.take, args=(calls[2],))
    third.start()
    third.join(timeout=0.3)
    assert third.is_alive()
    calls[0].end()
    third.join(timeout=5)
    assert not third.is_alive()


def test_slow_lines_keep_nobody_waiting_for_longer_than_a_fast_object_takes(monkeypatch) -> None:
    monkeypatch.setattr("medfl.server.room._FAST_S", 0.4)
    room = Room(1)
    room.take(Held())
    started = time.monotonic()
    room.take(Held())
    assert 0.2 < time.monotonic() - started < 3.0
    time.sleep(0.5)
    started = time.monotonic()
    room.take(Held())  # those before it are slow, and not counted
    assert time.monotonic() - started < 0.2


def test_a_call_that_is_over_already_takes_no_room() -> None:
    class Over(Held):
        def add_callback(self, after: Callable[[], None]) -> bool:
            return False

    room = Room(1)
    room.take(Over())
    started = time.monotonic()
    room.take(Held())
    assert time.monotonic() - started < 0.2


def test_a_large_object_goes_up_in_a_piece_of_its_own_and_arrives_whole(
    keeper, shelf, monkeypatch
) -> None:
    far = Far(keeper)
    taken: list[object] = []
    monkeypatch.setattr(Room, "take", lambda self, context: taken.append(context))
    content = os.urandom(LARGE)
    object_id = hashlib.sha256(content).hexdigest()
    keeper._guest("north").parcels.want([object_id])
    body = message_pb2.PushObjectRequest(
        node=Node(node_id=11), object_id=object_id, object_content=content
    ).SerializeToString()
    options = list(tunnel.GRPC_OPTIONS)
    with grpc.insecure_channel(f"127.0.0.1:{far.port}", options=options) as channel:
        forwarder = Forwarder(channel, "s")
        answer = forwarder.forward(tunnel.PUSH_OBJECT, {}, body, lambda: None)
        assert answer.status == 200
        assert len(taken) == 1
        laid = shelf.laid(object_id)
        assert laid is not None
        assert laid.read_bytes() == content
        forwarder.stop()
    far.stop()


def test_a_large_object_waits_at_the_hospital_until_there_is_room(keeper, monkeypatch) -> None:
    far, waits, free = Far(keeper), threading.Event(), threading.Event()

    def take(room: Room, context: object) -> None:
        waits.set()
        free.wait(10)

    monkeypatch.setattr(Room, "take", take)
    sent: list[int] = []

    class Watched:
        def future(self, pieces: Iterator[bytes], timeout: float) -> object:
            upload = channel.stream_unary(tunnel.UPLOAD)
            return upload.future((sent.append(len(p)) or p for p in pieces), timeout=timeout)

    body = send(b"x" * LARGE).body
    options = list(tunnel.GRPC_OPTIONS)
    with grpc.insecure_channel(f"127.0.0.1:{far.port}", options=options) as channel:
        forwarder = Forwarder(channel, "s")
        forwarder._upload = Watched()
        pushing = threading.Thread(
            target=forwarder.forward, args=(tunnel.PUSH_OBJECT, {}, body, lambda: None)
        )
        pushing.start()
        assert waits.wait(10)
        time.sleep(0.3)
        assert len(sent) == 1
        free.set()
        pushing.join(10)
        assert sent[1:] == [len(body)]
        forwarder.stop()
    far.stop()


def test_uploads_whose_lines_are_cut_give_their_room_back(keeper, monkeypatch) -> None:
    monkeypatch.setattr("medfl.server.room._FAST_S", 60.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    far = Far(keeper)

    def pieces(begun: threading.Event) -> Iterator[bytes]:
        yield encode(call("push-object"))
        begun.set()
        time.sleep(1.0)

    for _ in range(2):  # there are two places
        begun = threading.Event()
        with grpc.insecure_channel(f"127.0.0.1:{far.port}") as channel:
            asked = channel.stream_unary(tunnel.UPLOAD).future(pieces(begun))
            assert begun.wait(10)
            time.sleep(0.3)
            asked.cancel()
    with grpc.insecure_channel(f"127.0.0.1:{far.port}") as channel:
        whole = [encode(replace(send(b"x" * 9), body=b"")), send(b"x" * 9).body]
        got = decode_answer(channel.stream_unary(tunnel.UPLOAD)(iter(whole), timeout=20))
    assert got.status in (200, 403)
    far.stop()


def test_only_an_object_may_come_in_a_piece_of_its_own(line) -> None:
    far, _, _ = line
    options = list(tunnel.GRPC_OPTIONS)
    with grpc.insecure_channel(f"127.0.0.1:{far.port}", options=options) as channel:
        upload = channel.stream_unary(tunnel.UPLOAD)
        for pieces in ([], [b"x"], [encode(call("get-run")), b"y"], [encode(pull())]):
            with pytest.raises(grpc.RpcError) as refused:
                upload(iter(pieces), timeout=10)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
