"""Cases 26 to 28, 31, 32, 35, 36: who somebody is, and what time it is.

Certificates are made by the real commands under a clock that a spoil moves; gRPC's own checks of
them use the machine's true clock.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness.processes import until
from harness.world import World

Seen = Callable[[str], None]
DAY = 86400.0


def clock(folder: Path, seconds: float, name: str = "clock") -> dict[str, str]:
    """The spoil that moves a command's clock by so much; the file may change while it runs."""
    file = folder / name
    file.write_text(str(seconds))
    return {"clock": str(file)}


@pytest.mark.case(26, "gateway certificate of 90 days, made 100 days ago; then `start`")
def test_a_server_does_not_start_with_an_expired_certificate(world: World, seen: Seen) -> None:
    world.init(**clock(world.folder, -100 * DAY))
    over = world.done("server", "start", "--folder", str(world.fed))
    assert over.returncode == 2
    assert "certificate has expired" in over.stderr
    assert "medfl-server renew" in over.stderr
    assert world.done("server", "renew", "--folder", str(world.fed)).returncode == 0
    world.serve()
    seen("exit 2, names `medfl-server renew`, after which it starts")


@pytest.mark.campaign
@pytest.mark.case(
    26, "a server whose own clock is 95 days behind shows one that expired 5 days ago"
)
def test_a_client_refuses_an_expired_server(world: World, seen: Seen) -> None:
    world.init()
    world.serve()
    site = world.join("north")
    assert world.server is not None
    assert world.server.term() == 0
    past = clock(world.folder, -95 * DAY)
    assert world.done("server", "renew", "--folder", str(world.fed), **past).returncode == 0
    world.serve(**past)
    client = site.start(until_="has expired or is not yet valid", within_s=120)
    assert "Connected" not in client.said
    assert world.server is not None
    assert world.server.term() == 0
    assert world.done("server", "renew", "--folder", str(world.fed)).returncode == 0
    world.serve()
    client.wait_for("Connected", 90)
    seen("client says so and keeps trying; after `renew` it connects by itself")


@pytest.mark.case(27, "certificates of 10 days: `status` and `start` on both sides")
def test_a_certificate_that_ends_soon_is_warned_of(world: World, seen: Seen) -> None:
    world.init()
    toml = world.fed / "server.toml"
    toml.write_text(toml.read_text().replace("certificate_days = 90.0", "certificate_days = 10.0"))
    assert world.done("server", "renew", "--folder", str(world.fed)).returncode == 0
    server = world.serve()
    site = world.join("north")
    status = site.done("status", "--state", str(site.state))
    assert "ends in 10 days" in status.stdout
    client = site.start()
    assert "ends in 10 days" in client.said
    assert "ends in 10 days" in server.said
    status = world.done("server", "status", "--folder", str(world.fed))
    assert "ends in 10 days" in status.stdout
    seen("both say in how many days it ends and what to do")


@pytest.mark.case(28, "certificate made 95 days ago; and `medfl-server revoke` in mid-session")
def test_an_expired_or_revoked_client_is_refused(world: World, seen: Seen) -> None:
    world.init()
    world.serve()
    old, gone = world.join("old"), world.join("gone")
    gone.start()
    assert world.done("server", "revoke", "gone", "--folder", str(world.fed)).returncode == 0
    assert gone.process is not None
    assert gone.process.ended(30) == 5
    assert "revoked" in gone.process.said
    again = gone.start(until_="")
    assert again.ended(90) == 5
    late = old.start(until_="", **clock(world.folder, 91 * DAY))
    assert late.ended(90) == 5
    assert "certificate has expired" in late.said
    seen(
        "revoked: ended by itself with exit 5, and at every start; expired: exit 5, says what to do"
    )


@pytest.mark.case(31, "a client whose clock is 10 minutes ahead, then set right")
def test_a_wrong_clock_is_named(world: World, seen: Seen) -> None:
    world.init()
    world.serve()
    site = world.join("north")
    ahead = clock(world.folder, 600)
    client = site.start(until_="clock skew", within_s=120, **ahead)
    assert "10 minutes ahead" in client.said
    assert "Connected" not in client.said
    Path(ahead["clock"]).write_text("0")
    client.wait_for("Connected", 60)
    seen("says clock skew, 10 minutes ahead, and connects once the clock is right")


@pytest.mark.campaign
@pytest.mark.timeout(800)
@pytest.mark.case(
    32, "coordinator's and a hospital's clocks stepped back by 30 min in round 1 of 3"
)
def test_deadlines_do_not_follow_the_wall_clock(
    federation: Callable[..., World], seen: Seen, tmp_path: Path
) -> None:
    moved, fate = clock(tmp_path, 0), tmp_path / "fate"
    trainer = {"trainer": {"fate": str(fate), **moved}}
    world = federation(
        study={"rounds": 3}, server=moved, spoils={"south": {**moved, **trainer}, "north": moved}
    )
    warm = world.run()
    world.ends(warm)
    fate.write_text(json.dumps({"at": "train", "do": "sleep", "seconds": 30}))
    run = world.run(deadline=10)
    until(lambda: not fate.exists(), 120, "the training")
    Path(moved["clock"]).write_text("-1800")
    world.ends(run, 300)
    records = world.rounds(run)
    assert records[0]["left_out"] == {"south": "late"}
    assert 9 < records[0]["seconds"] < 25
    assert any(r["left_out"] == {} for r in records[1:])
    seen(f"round 1 over after {records[0]['seconds']:.1f} s (deadline 10 s); the run went on")


@pytest.mark.case(35, "`start --insecure` on both sides, settings, and plain TCP to the port")
def test_there_is_no_way_without_tls(world: World, seen: Seen) -> None:
    world.init()
    toml = world.fed / "server.toml"
    for module in ("server", "client"):
        over = world.done(module, "start", "--insecure")
        assert over.returncode == 2
        assert "No such option" in over.stderr
    before = toml.read_text()
    toml.write_text(before + "insecure = true\n")
    over = world.done("server", "start", "--folder", str(world.fed))
    assert over.returncode == 2
    assert "insecure" in over.stderr
    toml.write_text(before)
    world.serve()
    with socket.create_connection(("127.0.0.1", world.port), timeout=10) as line:
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        line.settimeout(20)
        assert b"HTTP" not in line.recv(100)
    assert without_certificate(world.port) == b""
    seen(
        "the option does not exist (exit 2), no setting of that kind (exit 2), plain HTTP/2 and "
        "TLS without a certificate get no answer"
    )


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.case(
    36, "site.toml, keys, approvals, studies, server.toml: empty, and writable by all"
)
def test_files_that_others_can_write_stop_the_start(
    federation: Callable[..., World], seen: Seen
) -> None:
    world = federation(("north",))
    site = world.sites["north"]
    assert site.process is not None
    assert site.process.term() == 0
    (decision,) = (site.state / "decisions").glob("*.json")
    (study,) = (site.state / "studies").glob("*.json")
    files = [site.site_file, site.state / "signing.key", site.state / "identity.pem"]
    files += [site.state / "authority.pem", site.state / "enrolment.json", decision, study]
    tried = 0
    for file in files:
        refused_start(site.start, file)
        tried += 1
    assert world.server is not None
    assert world.server.term() == 0
    keys = [world.fed / "keys" / n for n in ("authority.pem", "gateway.pem", "coordinator.key")]
    for file in [world.fed / "server.toml", *keys]:
        refused_start(world.serve, file)
        tried += 1
    seen(f"{tried} files, each empty and each with mode 0666: exit 2 or 7, the file is named")


def without_certificate(port: int) -> bytes:
    """What a TLS client that shows nothing gets to hear of HTTP/2."""
    bare = ssl.create_default_context()
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line, suppress(OSError):
        with bare.wrap_socket(line) as tls:
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            return tls.recv(100)
    return b""


def refused_start(start: Callable[..., Any], file: Path) -> None:
    """Empty, then open to all: the command ends and names the file."""
    content, mode = file.read_bytes(), file.stat().st_mode & 0o777
    file.write_bytes(b"")
    process = start(until_="")
    assert process.ended(90) in (2, 7), f"{file.name} empty: {process.said}"
    assert file.name in process.said, process.said
    file.write_bytes(content)
    file.chmod(0o666)
    process = start(until_="")
    assert process.ended(90) in (2, 7), f"{file.name} 0666: {process.said}"
    assert file.name in process.said, process.said
    file.chmod(mode)
