"""Cases 12, 13, 15, 51 and 53: what a person meets at the command line."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.world import World, seconds

Seen = Callable[[str], None]


@pytest.mark.case(12, "another program listens on the gateway's port")
def test_a_port_in_use_is_said(world: World, seen: Seen) -> None:
    world.init()
    with socket.create_server(("127.0.0.1", world.port)):
        over = world.done("server", "start", "--folder", str(world.fed))
    assert over.returncode == 2
    assert f"{world.address}: cannot be listened on" in over.stderr
    seen("exit 2, names address and `listen`")


@pytest.mark.case(13, "`medfl-server start` twice on one folder")
@pytest.mark.case(15, "min_sites = 3, one hospital approved it and is off, --wait 3")
def test_one_server_a_folder_and_a_quorum_that_is_not_there(world: World, seen: Seen) -> None:
    world.init()
    server = world.serve()
    second = world.done("server", "start", "--folder", str(world.fed))
    assert second.returncode == 7
    assert "another medfl-server runs on this folder" in second.stderr
    world.publish(min_sites=3)
    world.join("north").approve("tiny")
    world.join("south")
    since = time.monotonic()
    over = world.done("server", "run", "tiny", "--wait", "3", "--folder", str(world.fed))
    took = seconds(since)
    assert over.returncode == 6
    assert "0 of the 3 sites" in over.stdout
    assert "north (not connected)" in over.stdout
    assert "south (the study is not approved here)" in over.stdout
    assert server.popen.poll() is None
    seen(
        f"13: exit 7, the first goes on; 15: exit 6 after {took}, each missing site with its reason"
    )


@pytest.mark.case(51, "a line edited, one removed, the tail cut; on both sides")
def test_a_changed_log_is_found_by_its_line(world: World, seen: Seen) -> None:
    world.init()
    server = world.serve()
    site = world.join("north")
    client = site.start()
    time.sleep(1)
    assert client.term() == 0
    client = site.start()
    assert client.term() == 0
    assert server.term() == 0
    folder, state = ("--folder", str(world.fed)), ("--state", str(site.state))
    sides = [
        (world.fed / "audit.jsonl", lambda: world.done("server", "log", "--verify", *folder)),
        (site.state / "audit.jsonl", lambda: site.done("audit", "verify", *state)),
    ]
    for log, verify in sides:
        whole = log.read_bytes()
        lines = whole.splitlines(keepends=True)
        assert verify().returncode == 0
        for damaged, says in (
            (
                [lines[0], lines[1].replace(b'"what":"', b'"what":"x'), *lines[2:]],
                "line 2 was changed",
            ),
            ([lines[0], *lines[2:]], "line 2 says that it is line 3"),
            (lines[:2], "is missing: the other side countersigned"),
        ):
            log.write_bytes(b"".join(damaged))
            over = verify()
            assert over.returncode == 7
            assert says in over.stderr, over.stderr
        log.write_bytes(whole)
    seen("exit 7 each time, names the line; the cut tail by the other side's countersignature")


@pytest.mark.case(
    53, "unknown key and wrong type in study, site.toml, server.toml, client.toml, env"
)
def test_a_misspelt_setting_is_named(world: World, seen: Seen, tmp_path: Path) -> None:
    world.init()
    study = world.folder / "study.toml"
    home = world.folder / "home"
    home.mkdir()
    site, client, toml = home / "site.toml", home / "client.toml", world.fed / "server.toml"
    before = toml.read_text()
    good = 'name = "a"\n[data]\nformat = "table"\npath = "x.csv"\n'
    sound = (
        'name = "s"\n[task]\nkind = "risk"\nclasses = ["no", "yes"]\n[record]\n'
        'features = [{ name = "a" }]\n[model]\nname = "logistic"\n[training]\nlearning_rate = 0.1\n'
        "batch_size = 8\nlocal_steps = 4\n[federation]\n"
    )
    folder = ("--folder", str(world.fed))
    for file, text, argv, key in (
        (
            study,
            sound + "round = 3\n",
            ("server", "study", "publish", str(study), *folder),
            "round",
        ),
        (
            study,
            sound + 'rounds = "3"\n',
            ("server", "study", "publish", str(study), *folder),
            "rounds",
        ),
        (site, "polcy = 1\n" + good, ("client", "budget", str(site)), "polcy"),
        (site, "device = 3\n" + good, ("client", "budget", str(site)), "device"),
        (toml, before + "workerz = 3\n", ("server", "status", *folder), "workerz"),
        (
            toml,
            before.replace("workers = 512", 'workers = "512"'),
            ("server", "status", *folder),
            "workers",
        ),
        (client, "stat = 1\n", ("client", "status"), "stat"),
        (client, "days = true\n", ("client", "status"), "days"),
    ):
        file.write_text(text)
        if file == client:
            world.env["MEDFL_CLIENT_TOML"] = str(client)
        over = world.done(*argv)
        assert over.returncode == 2, (key, over.stdout, over.stderr)
        assert key in over.stderr
        assert file.name in over.stderr
    del world.env["MEDFL_CLIENT_TOML"]
    toml.write_text(before)
    world.env["MEDFL_SERVER_LISTN"] = "x"
    over = world.done("server", "status", *folder)
    del world.env["MEDFL_SERVER_LISTN"]
    assert over.returncode == 2
    assert "MEDFL_SERVER_LISTN" in over.stderr
    assert json.loads(world.done("server", "status", *folder, "--json").stdout)["name"] == "Test"
    seen("exit 2 each time, file and key named; an unknown MEDFL_SERVER_… variable too")
