"""A hospital divided into two users: who holds the line cannot read what it protects."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from medfl.client.hatch import CALLS, TASKS, FarTrainer, Hatch, attached, dial, line_through
from medfl.common.coordination import Bye, Done, Renew
from medfl.common.errors import ConfigError, FederationError, PolicyRefused, TrainerDied

from .conftest import World, until, write_hospital

# Users that every Linux has; who they are does not matter, only that they are three.
DATA, NETWORK, OTHER = 5, 65534, 3
GROUP = 45_678  # of the socket alone
# Debian's own Python has Debian's python3-seccomp.
ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON, SANDBOX = "/usr/bin/python3", Path(__file__).with_name("sandbox.py")


def user(uid: int, *, line: bool = False, alone: bool = False) -> tuple[str, ...]:
    """How to run something as a user. line: in the socket's group. alone: without any network."""
    group = GROUP if uid == NETWORK else uid
    groups = [f"--groups={GROUP}"] if line else ["--clear-groups"]
    changed = ["setpriv", f"--reuid={uid}", f"--regid={group}", *groups, "--no-new-privs"]
    return (*(["unshare", "--net"] if alone else []), *changed, "--inh-caps=-all")


def confined(unit: str) -> tuple[str, ...]:
    """Under the system calls, address families and memory that this unit file allows."""
    return (PYTHON, str(SANDBOX), str(ROOT / "deploy" / "systemd" / f"{unit}.service"))


def readable(path: Path, uid: int) -> bool:
    """Whether a user can read the file or list the folder."""
    command = ["ls" if path.is_dir() else "cat", str(path)]
    done = subprocess.run([*user(uid), *command], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def users(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    if not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("setpriv and unshare (util-linux) are not there")
    there = subprocess.run([PYTHON, "-c", "import seccomp"], capture_output=True, check=False)
    if there.returncode != 0 or not shutil.which("systemd-analyze"):
        pytest.skip("python3-seccomp and systemd-analyze (Debian packages) are not there")
    # This Python may lie in root's own folder; Debian's can run what is installed for it, too.
    packages = [p for p in sys.path if "site-packages" in p]
    world.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *packages])
    for python in (sys.executable, PYTHON):
        # Through `env`: setpriv itself still has root's rights when it starts a command.
        probe = [*user(DATA, alone=True), "env", python, "-c", "import medfl.client.runner"]
        done = subprocess.run(
            probe, env=world.environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            world.python = python
            return
    pytest.skip(f"another user cannot run this Python: {done.stderr[-200:]}")


def listened(path: Path) -> socket.socket:
    """What stands for systemd: a socket that hears from any user."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    made.settimeout(20)
    path.chmod(0o666)
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for a socket, as systemd makes it."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o750)
    return folder / "line.sock"


class Echo:
    """A trainer that answers with what it was given."""

    def start(self) -> None:
        pass

    def do(self, task: bytes) -> bytes:
        if task == b"die":
            raise TrainerDied("it died")
        return task[::-1]

    def stop(self) -> None:
        pass


@pytest.fixture
def hatch(place: Path) -> Iterator[Hatch]:
    made = Hatch(place, frozenset({os.geteuid()}))
    made.start()
    yield made
    made.stop()


def test_tasks_go_through_the_hatch_and_a_dead_trainer_is_told(hatch: Hatch, place: Path) -> None:
    assert not hatch.trainer.attached
    with pytest.raises(TrainerDied, match="not there"):
        hatch.trainer.do(b"abc")
    with attached(f"unix:{place}", Echo()):
        until(lambda: hatch.trainer.attached, 20)
        assert hatch.trainer.do(b"abc") == b"cba"
        with pytest.raises(TrainerDied, match="training process ended"):
            hatch.trainer.do(b"die")
        assert hatch.trainer.do(b"x" * 3_000_000) == b"x" * 3_000_000
    until(lambda: not hatch.trainer.attached, 20)


def test_a_network_side_that_comes_back_is_found_again(hatch: Hatch, place: Path) -> None:
    with attached(f"unix:{place}", Echo()):
        until(lambda: hatch.trainer.attached, 20)
        hatch.stop()
        again = Hatch(place, frozenset({os.geteuid()}))
        again.start()
        try:
            until(lambda: again.trainer.attached, 20)
            assert again.trainer.do(b"abc") == b"cba"
        finally:
            again.stop()


def test_a_data_side_that_hangs_up_in_a_task_is_noticed_at_once() -> None:
    ours, theirs = socket.socketpair()
    far, theirs_pipe = FarTrainer(), Connection(theirs.detach())
    far.attach(Connection(ours.detach()))
    threading.Timer(0.2, theirs_pipe.close).start()
    with pytest.raises(TrainerDied, match="hung up"):
        far.do(b"abc")


def test_stopping_wakes_who_waits_for_a_task() -> None:
    ours, theirs = socket.socketpair()
    far = FarTrainer()
    far.attach(Connection(ours.detach()))
    threading.Timer(0.2, far.stop).start()
    with theirs, pytest.raises(TrainerDied, match="hung up"):
        far.do(b"abc")


def test_certificates_cannot_be_asked_for_through_the_hatch(hatch: Hatch, place: Path) -> None:
    from medfl.common.coordination import Enrolled

    with line_through(f"unix:{place}") as line:
        with pytest.raises(PolicyRefused, match="does not pass the hatch"):
            line.call("Renew", Renew("x"), Enrolled)
        # No coordinator is connected; the data side hears that as it would without a wall.
        with pytest.raises(FederationError, match="cannot be reached"):
            line.call("Bye", Bye("x"), Done)


def first_word(address: str) -> bytes:
    """What the network side says to who wants tasks; it has nothing to say."""
    pipe = dial(address, TASKS)
    assert pipe.poll(10), "was let in"
    return pipe.recv_bytes()


def test_a_user_who_is_not_expected_is_turned_away(place: Path) -> None:
    hatch = Hatch(place, frozenset({os.geteuid() + 1}))
    hatch.start()
    try:
        # Before or after the first word, as the two processes happen to run.
        with pytest.raises((EOFError, ConnectionResetError, FederationError)):
            first_word(f"unix:{place}")
        assert not hatch.trainer.attached
    finally:
        hatch.stop()


def test_a_socket_that_others_could_have_put_there_is_not_used(hatch: Hatch, place: Path) -> None:
    place.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        dial(f"unix:{place}", CALLS)


def test_a_network_side_that_does_not_run_is_said(place: Path) -> None:
    with pytest.raises(FederationError, match="medfl-client line"):
        dial(f"unix:{place}", CALLS)


@pytest.fixture
def north(users: None, world: World) -> Path:
    """An enrolled hospital whose files belong to DATA; its coordinator runs."""
    listen = world.coordinator()
    world.start("server", "start", by=confined("medfl-server"), says="listening on")
    home = world.folder / "north"
    write_hospital(home, "north")
    for path in (home, *home.iterdir()):
        os.chown(path, DATA, DATA)
        path.chmod(0o700 if path.is_dir() else 0o600)
    token = world.says("server", "invite", "north")["token"]
    state = str(home / "state")
    world.done(
        "client", "enrol", listen, "--token", token, "--state", state, by=(*user(DATA), "env")
    )
    return home


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_divided_hospital_trains_and_its_network_side_reads_nothing(
    world: World, north: Path
) -> None:
    state, line = north / "state", world.folder / "line"
    line.mkdir()
    os.chown(line, NETWORK, GROUP)
    line.chmod(0o750)
    sock, network = line / "line.sock", world.folder / "net"
    options = ("--state", str(state), "--site", str(north / "site.toml"))
    division = ("client", "divide", "--state", str(state), "--network", str(network))
    division += ("--network-user", str(NETWORK), "--socket", str(sock))
    assert world.says(*division)["site"] == "north"
    world.done(*division)  # once more changes nothing

    carry = ("client", "line", "--state", str(network), "--peer", str(DATA), "--socket", str(sock))
    net = (*user(NETWORK), *confined("medfl-line"))
    carrier = world.start(*carry, by=net, says="waiting for the data side")
    data = (*user(DATA, line=True, alone=True), *confined("medfl-train"))
    assert world.says("client", "studies", *options[:2], by=data)["studies"][0]["name"] == "tiny"
    approved = world.says("client", "approve", "tiny", "--yes", *options, by=data)
    assert approved["sent"]
    manager = listened(north / "notify")
    notify = {"NOTIFY_SOCKET": str(north / "notify")}
    client = world.start("client", "start", *options, by=data, says="Connected", **notify)
    world.hears(carrier, "The data side is there")
    assert manager.recv(100) == b"READY=1"  # Type=notify of the unit
    assert manager.recv(100) == b"STATUS=connected"
    manager.close()
    (north / "notify").unlink()
    first = world.says("server", "run", "tiny", "--wait", "300")
    assert (first["state"], first["sites"]) == ("done", ["north"])

    # What the wall is for: whoever takes the network side over has none of these.
    own = [p for p in north.rglob("*") if p.name != "state"]
    assert {"cases.csv", "signing.key", "audit.jsonl"} <= {p.name for p in own}
    assert [p for p in (north, state, *own) if readable(p, NETWORK)] == []
    assert readable(north / "cases.csv", DATA)
    assert readable(network / "identity.pem", NETWORK)
    assert not (state / "identity.pem").exists()
    assert not readable(network / "identity.pem", DATA)
    assert not (network / "signing.key").exists()
    # In the group of the socket is not enough: the kernel says who it is.
    stranger = (*user(OTHER, line=True), PYTHON, "-c", PEEK, str(sock))
    peek = subprocess.run(stranger, capture_output=True, text=True, check=False)
    assert peek.stdout.split() == ["connected", "closed"], peek.stderr

    # A network side that died comes back to the same warm data side.
    carrier.kill()
    world.start(*carry, by=net, says="The data side is there")
    world.hears(client, "Connected again")
    assert world.says("server", "run", "tiny", "--wait", "300")["state"] == "done"
    said = world.says("client", "status", *options[:2], by=data)
    assert (said["client"], said["certificate_days"]) == ("connected", None)
    assert (
        world.says("client", "audit", "verify", *options[:2], by=(*user(DATA), "env"))["heads"] > 0
    )
    assert world.end(client) == 0


PEEK = """
import socket, sys
end = socket.socket(socket.AF_UNIX)
end.connect(sys.argv[1])
print("connected")
try:
    print("closed" if not end.recv(1) else "open")
except ConnectionResetError:
    print("closed")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dividing_is_refused_where_it_would_divide_nothing(world: World, north: Path) -> None:
    division = ("client", "divide", "--state", str(north / "state"))
    division += ("--network", str(world.folder / "net"))
    same = world.done(*division, "--network-user", str(DATA), code=2)
    assert "name another user" in same.stderr
    unable = world.done(*division, "--network-user", str(NETWORK), by=(*user(DATA), "env"), code=2)
    assert "as root" in unable.stderr
    whole = ("client", "line", "--state", str(north / "state"), "--peer", str(DATA))
    held = world.done(*whole, by=(*user(DATA), "env"), code=2)
    assert "holds the hospital's signing key" in held.stderr
