"""Peers that idle, dawdle, crowd and knock: each is bounded, and the others are answered."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from medfl.client import enrolment
from medfl.client.coordinator import connected
from medfl.client.premises import Home
from medfl.common import certificates, invitation
from medfl.common.coordination import AskStudies, Studies
from medfl.common.errors import MedflError, PolicyRefused
from medfl.common.invitation import Token
from medfl.server import authority, bounds
from medfl.server.federation import Federation
from medfl.server.gateway import Gateway
from medfl.server.settings import ServerSettings, open_federation


@contextmanager
def listening(folder: Path, **keys: int) -> Iterator[tuple[Federation, str]]:
    """A gateway over real TLS, and its address."""
    settings = ServerSettings(name="Test", listen="127.0.0.1:0", **keys)
    authority.init(folder / "fed", settings, time.time())
    federation = open_federation(folder / "fed")
    gateway = Gateway(federation, settings)
    gateway.start()
    try:
        yield federation, f"127.0.0.1:{gateway.port}"
    finally:
        gateway.stop(0)


def joined(federation: Federation, address: str, folder: Path, site: str) -> Home:
    home = Home(folder / site)
    enrolment.enrol(home, address, authority.invite(federation, site, 24))
    return home


def asks(home: Home) -> Studies:
    with enrolment.line_to(home) as line:
        return line.call("Studies", AskStudies(), Studies)


def hung_up(line: socket.socket) -> bool:
    line.setblocking(False)
    try:
        return line.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_of_a_crowd_from_one_address_a_quarter_stays_and_others_are_answered(
    tmp_path: Path,
) -> None:
    with listening(tmp_path, connections=80, workers=8) as (federation, address):
        home = joined(federation, address, tmp_path, "a")
        host, _, port = address.partition(":")
        with ExitStack() as lines:
            crowd = [
                lines.enter_context(socket.create_connection((host, int(port)), timeout=5))
                for _ in range(100)
            ]
            end = time.monotonic() + 15
            while sum(not hung_up(line) for line in crowd) > 20 and time.monotonic() < end:
                time.sleep(0.1)
            assert sum(not hung_up(line) for line in crowd) <= 20
            assert asks(home).published == ()


def test_who_has_sent_least_is_cut_first(tmp_path: Path) -> None:
    with listening(tmp_path, connections=40, workers=8) as (federation, address):
        home = joined(federation, address, tmp_path, "a")
        host, _, port = address.partition(":")
        with enrolment.line_to(home) as line, ExitStack() as lines:
            line.call("Studies", AskStudies(), Studies)
            crowd = [
                lines.enter_context(socket.create_connection((host, int(port)), timeout=5))
                for _ in range(30)
            ]
            end = time.monotonic() + 15
            while sum(not hung_up(idle) for idle in crowd) > 9 and time.monotonic() < end:
                time.sleep(0.1)
            # Of one address 10 stay: the one that has spoken, and 9 that have not.
            assert sum(not hung_up(idle) for idle in crowd) == 9
            line.call("Studies", AskStudies(), Studies)


def test_header_only_calls_are_bounded_by_peer_and_do_not_hold_the_others(tmp_path: Path) -> None:
    with listening(tmp_path, workers=32) as (federation, address):
        home, other = (joined(federation, address, tmp_path, s) for s in ("a", "b"))
        over = threading.Event()

        def never() -> Iterator[bytes]:
            over.wait(60)
            yield b"{}"

        with enrolment.line_to(home) as line:
            send = line.channel.stream_unary("/medfl.Coordinator/Studies")
            calls = [send.future(never(), timeout=60) for _ in range(60)]
            end = time.monotonic() + 15
            while sum(c.done() for c in calls) < 60 - bounds.CALLS_OF_ONE:
                assert time.monotonic() < end
                time.sleep(0.05)
            refused = [c for c in calls if c.done()]
            assert {c.code() for c in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert asks(other).published == ()
            for call in calls:
                call.cancel()
            over.set()
        assert asks(home).published == ()


def test_a_call_whose_body_does_not_come_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medfl.server import gateway

    monkeypatch.setattr(gateway, "_BODY_S", 1.0)
    with listening(tmp_path, workers=4) as (federation, address):
        home, over = joined(federation, address, tmp_path, "a"), threading.Event()

        def never() -> Iterator[bytes]:
            over.wait(60)
            yield b"{}"

        with enrolment.line_to(home) as line:
            send = line.channel.stream_unary("/medfl.Coordinator/Studies")
            calls = [send.future(never(), timeout=30) for _ in range(4)]
            for call in calls:
                assert call.code() is grpc.StatusCode.CANCELLED
            over.set()
            line.call("Studies", AskStudies(), Studies)


def thief_of(token: Token, address: str, folder: Path) -> None:
    enrolment.enrol(Home(folder / "thief"), address, token)


def test_a_used_token_is_noted_once_and_then_opens_no_door(tmp_path: Path) -> None:
    with listening(tmp_path, workers=8) as (federation, address):
        token = authority.invite(federation, "a", 24)
        enrolment.enrol(Home(tmp_path / "a"), address, token)
        before = federation.audit.head().n
        for _ in range(5):
            with pytest.raises(PolicyRefused, match="has been used"):
                thief_of(token, address, tmp_path)
        assert federation.audit.head().n == before + 1
        later = Federation(federation.folder, federation.name, lambda: time.time() + 901)
        assert authority.anchors(later) == []
        key, guest = invitation.guest_certificate(token, time.time())
        with pytest.raises(PolicyRefused, match="not known here"):
            authority.identify(later, certificates.pem_of(guest).encode())
        del key


def test_an_expired_token_does_not_get_past_the_handshake_and_is_told_why(tmp_path: Path) -> None:
    with listening(tmp_path, workers=8) as (federation, address):
        token = authority.invite(federation, "a", 0.0001)
        time.sleep(0.5)
        with pytest.raises(PolicyRefused, match="has expired"):
            thief_of(token, address, tmp_path)
        key, guest = invitation.guest_certificate(token, time.time())
        with connected(address, invitation.authority_of(token), key, guest) as line:
            with pytest.raises(grpc.RpcError) as refused:
                line.channel.unary_unary("/medfl.Coordinator/Enrol")(b"{}", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_connections_leave_descriptors_for_the_workers() -> None:
    assert bounds.connections_within(4096, 512, 65_536) == 4096
    assert bounds.connections_within(4096, 512, 1024) == 1024 - 512 - 192
    assert bounds.connections_within(4096, 512, 256) == 16


CROWD = """
import resource, socket, sys, time
host, port = sys.argv[1].split(":")
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
lines = []
for _ in range(1100):
    try:
        lines.append(socket.create_connection((host, int(port)), timeout=5))
    except OSError:
        pass
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_1100_idle_connections_at_1024_descriptors_do_not_end_the_server(tmp_path: Path) -> None:
    """As it was: OSError out of the queue's loop, and the server was gone."""
    settings = ServerSettings(name="Test", listen="127.0.0.1:0")
    authority.init(tmp_path / "fed", settings, time.time())
    federation = open_federation(tmp_path / "fed")

    start = [sys.executable, "-P", "-m", "medfl.server.cli", "start", "--folder", tmp_path / "fed"]
    with ExitStack() as ending:
        errors = ending.enter_context((tmp_path / "errors").open("wb"))
        server = subprocess.Popen(
            ["/bin/sh", "-c", 'ulimit -n 1024; exec "$@"', "sh", *start],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        ending.callback(server.wait, 60)
        ending.callback(server.terminate)
        end = time.monotonic() + 60
        while not (port := started(federation)):
            assert time.monotonic() < end
            assert server.poll() is None
            time.sleep(0.2)
        address = f"127.0.0.1:{port}"
        home = joined(federation, address, tmp_path, "a")
        crowd = ending.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", CROWD, address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        ending.callback(crowd.kill)
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "there\n"
        open_ = len(os.listdir(f"/proc/{server.pid}/fd"))
        assert open_ < 1024 - 512
        end = time.monotonic() + 40
        while True:
            try:
                assert asks(home).published == ()
                break
            except MedflError:
                assert time.monotonic() < end
                time.sleep(0.5)
        assert server.poll() is None
        assert "Traceback" not in (tmp_path / "errors").read_text()


def started(federation: Federation) -> int:
    said = [e for e in federation.audit.lines() if e["what"] == "server started"]
    return int(said[-1]["about"]["port"]) if said else 0
