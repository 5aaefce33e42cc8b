"""`medfl-client check` without a study: green, or which one thing is to be mended, and how."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from medfl.client import checkup, consent, enrolment, machine, reach
from medfl.client.cli import main
from medfl.client.data.check import check
from medfl.client.machine import Item
from medfl.client.premises import Home
from medfl.client.reading import Reading, site_word
from medfl.common import config
from medfl.common.errors import FederationError
from medfl.common.kept import save_record
from medfl.common.site import load_site
from medfl.common.study import Study
from medfl.server import authority, studies
from medfl.server.federation import Federation
from medfl.server.gateway import Gateway
from medfl.server.settings import ServerSettings, open_federation

STUDY = {
    "name": "falls",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a"}]},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": {"rounds": 1},
}


@dataclass
class Clock:
    """TLS looks at the real clock, so this one starts there."""

    offset: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@dataclass
class World:
    """A coordinator that listens, and an enrolled hospital with 40 patients."""

    federation: Federation
    gateway: Gateway
    home: Home
    clock: Clock
    site_file: Path

    def items(self) -> dict[str, Item]:
        """The page, by topic; where a topic has two lines, the later."""
        return {i.topic: i for i in checkup.everything(self.home, self.site_file)}

    def moved_to(self, address: str) -> None:
        """The coordinator's address is another from now on."""
        known = self.home.enrolment()
        save_record(self.home.enrolment_file, replace(known, address=address))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    federation, gateway = coordinator(tmp_path / "fed")
    clock = Clock()
    home = Home(tmp_path / "state", clock)
    token = authority.invite(federation, "st-marys", 1)
    enrolment.enrol(home, f"127.0.0.1:{gateway.port}", token)
    rows = [f"Smith{k},{k % 7},{'yes' if k % 2 else 'no'}" for k in range(40)]
    (tmp_path / "cases.csv").write_text("\n".join(["patient,a,label", *rows]))
    site_file = tmp_path / "site.toml"
    site_file.write_text(
        'name = "st-marys"\ndevice = "cpu"\n[data]\nformat = "table"\npath = "cases.csv"\n'
    )
    yield World(federation, gateway, home, clock, site_file)
    gateway.stop(0)


def coordinator(folder: Path) -> tuple[Federation, Gateway]:
    settings = ServerSettings(name="Test", listen="127.0.0.1:0", workers=4)
    authority.init(folder, settings, time.time())
    federation = open_federation(folder)
    gateway = Gateway(federation, settings)
    gateway.start()
    return federation, gateway


def red(items: dict[str, Item]) -> dict[str, int]:
    return {topic: item.code for topic, item in items.items() if item.state == "red"}


def test_a_hospital_that_is_well_is_green_and_its_page_names_no_patient_and_no_path(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies.publish(world.federation, config.parse(STUDY, Study, "study"))
    items = world.items()
    assert {item.state for item in items.values()} == {"green"}
    assert items["data for falls"].said == "they serve; no faulty cases are left out; not decided"
    arguments = ["check", str(world.site_file), "--state", str(world.home.folder)]
    assert main([*arguments, "--html", str(tmp_path / "page.html")]) == 0
    assert "Ready. Next: medfl-client studies" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    told = capsys.readouterr().out
    assert json.loads(told)["ready"] is True
    for text in (told, (tmp_path / "page.html").read_text()):
        assert str(tmp_path) not in text
        assert "Smith" not in text
    # A study may also be named, and then only the data are looked at.
    assert main([*arguments, "--study", "falls"]) == 0
    assert "40 usable cases" in capsys.readouterr().out


def test_data_that_cannot_serve_are_red_and_say_why_only_on_the_screen(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    studies.publish(world.federation, config.parse(STUDY, Study, "study"))
    (world.site_file.parent / "cases.csv").write_text("patient,b,label\nSmith1,3,yes\n")
    arguments = ["check", str(world.site_file), "--state", str(world.home.folder)]
    assert main(arguments) == 3
    assert "feature_absent" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 3
    told = capsys.readouterr().out
    assert "cases.csv" not in told
    assert "Smith" not in told
    assert red(world.items()) == {"data for falls": 3}


def test_an_approval_for_cases_that_have_changed_is_pointed_at(world: World) -> None:
    study = config.parse(STUDY, Study, "study")
    studies.publish(world.federation, study)
    world.items()
    site = load_site(world.site_file)
    found, word = check(site, study), site_word(world.home.signing_key(), site)
    consent.approve(world.home, study, Reading(found.digest, found.cases["train"], word), 30)
    item = world.items()["data for falls"]
    assert item.state == "green"
    assert "approved until" in item.said
    with (world.site_file.parent / "cases.csv").open("a") as table:
        table.write("\n" + "\n".join(f"Jones{k},2,yes" for k in range(20)))
    item = world.items()["data for falls"]
    assert (item.state, "approved for other cases" in item.said) == ("warning", True)


def test_the_step_at_which_a_connection_fails_is_named(world: World, tmp_path: Path) -> None:
    port = world.gateway.port
    world.moved_to(f"nowhere.invalid:{port}")
    assert red(world.items()) == {"connection: name": 6}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        world.moved_to(f"127.0.0.1:{closed.getsockname()[1]}")
        items = world.items()
    assert red(items) == {"connection: tcp": 6}
    assert "medfl-server runs" in items["connection: tcp"].todo
    with answering(lambda asked: b"HTTP/1.1 400 Bad Request\r\n\r\n") as place:
        world.moved_to(place)
        items = world.items()
    assert red(items) == {"connection: tls": 6}
    assert "does not speak TLS 1.3" in items["connection: tls"].said
    _, other = coordinator(tmp_path / "other")
    world.moved_to(f"127.0.0.1:{other.port}")
    items = world.items()
    other.stop(0)
    assert red(items) == {"connection: tls": 6}
    assert "is not the coordinator of this federation" in items["connection: tls"].said
    world.moved_to(f"127.0.0.1:{port}")
    assert red(world.items()) == {}
    authority.revoke(world.federation, "st-marys", "")
    items = world.items()
    assert red(items) == {"connection: identity": 5}
    assert "was revoked" in items["connection: identity"].said


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """A server that says what `answer` makes of the first bytes; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with server.accept()[0] as guest:
                        guest.sendall(answer(guest.recv(4096)))

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_a_proxy_that_refuses_is_told_from_a_coordinator_that_does(world: World) -> None:
    world.moved_to("coordinator.example:443")
    asked = []

    def refuse(request: bytes) -> bytes:
        asked.append(request)
        return b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"

    with answering(refuse) as place:
        environment = {"https_proxy": f"http://it:secret@{place}"}
        *_, last = reach.steps(world.home, environment)
    assert asked[0].startswith(b"CONNECT coordinator.example:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic aXQ6c2VjcmV0\r\n" in asked[0]
    assert last.name == "proxy"
    assert "name and password" in last.todo


def test_no_proxy_names_what_is_reached_directly() -> None:
    environment = {"https_proxy": "http://proxy:3128", "no_proxy": "localhost, example"}
    assert reach.proxy_of("coordinator.example:443", environment) is None
    found = reach.proxy_of("coordinator.org:443", environment)
    assert found is not None
    assert (found.hostname, found.port) == ("proxy", 3128)
    assert reach.proxy_of("coordinator.org:443", {}) is None


def test_a_clock_that_is_off_and_a_certificate_that_ends_soon_are_seen(world: World) -> None:
    world.clock.offset = 1000
    items = world.items()
    assert red(items) == {"clock": 6}
    assert "17 minutes ahead" in items["clock"].said
    world.clock.offset = 80 * 86400
    assert world.items()["certificate"].state == "warning"
    world.clock.offset = 91 * 86400
    assert red(world.items())["certificate"] == 5


def test_keys_open_to_others_and_a_missing_site_file_are_red(world: World) -> None:
    (world.home.folder / "signing.key").chmod(0o644)
    assert red(world.items())["permissions"] == 2
    (world.home.folder / "signing.key").chmod(0o600)
    world.site_file.unlink()
    items = world.items()
    assert red(items) == {"site file": 2}
    assert items["site file"].said == "site.toml is not there"


def test_a_gpu_that_is_asked_for_and_not_there_is_red(world: World) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    site = load_site(world.site_file)
    (item,) = machine.gpu(replace(site, device="cuda"))
    assert (item.state, item.code) == ("red", 5)
    (item,) = machine.gpu(replace(site, device="auto"))
    assert item.state == "green"


def test_a_disk_that_is_nearly_full_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    for free, state in ((50e6, "red"), (0.5e9, "warning"), (50e9, "green")):
        usage = shutil._ntuple_diskusage(1, 1, int(free))  # type: ignore[attr-defined]
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert machine.disk(world.home, load_site(world.site_file)).state == state


def test_a_hospital_that_is_not_enrolled_is_told_so_and_the_rest_is_checked(
    world: World, tmp_path: Path
) -> None:
    stranger = Home(tmp_path / "nobody", world.clock)
    items = {i.topic: i for i in checkup.everything(stranger, world.site_file)}
    assert red(items) == {"federation": 2}
    assert items["site file"].state == "green"
    assert not stranger.folder.exists()


def test_an_address_without_a_name_server_is_not_taken_for_an_attack(world: World) -> None:
    world.moved_to("nowhere.invalid:443")
    with pytest.raises(FederationError, match="its name has no address"):
        with enrolment.line_to(world.home) as line:
            consent.fetch(world.home, line)
    world.moved_to("127.0.0.1:9")
    with pytest.raises(FederationError, match="no server listens"):
        with enrolment.line_to(world.home) as line:
            consent.fetch(world.home, line)
