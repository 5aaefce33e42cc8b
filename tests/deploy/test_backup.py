"""What was backed up can be put back and goes on; what is old by then is noticed."""

from __future__ import annotations

import io
import json
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from medfl.client import backup as client_backup
from medfl.client.composition import Charge
from medfl.client.data.withdrawn import change_list, list_path
from medfl.client.deid.keys import load_secret, secret_path
from medfl.client.ledger import Ledger
from medfl.client.premises import Enrolment, Home
from medfl.common import backup
from medfl.common.errors import ConfigError, StorageError
from medfl.common.kept import save_record
from medfl.common.signing import new_key
from medfl.common.site import load_site

from .conftest import World, until, write_hospital


def charge(round_: int) -> Charge:
    return Charge("s" * 64, "tiny", "r", "training", round_, 1.0, 0.1, 5)


@pytest.fixture
def hospital(tmp_path: Path) -> tuple[Home, Path]:
    """A state folder, and what lies where site.toml says, without a coordinator."""
    write_hospital(tmp_path / "north", "north")
    site_file = tmp_path / "north" / "site.toml"
    home = Home(tmp_path / "north" / "state")
    home.folder.mkdir(mode=0o700)
    new_key(home.signing_file)
    save_record(home.enrolment_file, Enrolment("north", "there:1", "Test", "0" * 64, 0))
    home.record("enrolled")
    save_record(home.folder / "deep" / "down" / "here.json", Enrolment("x", "", "", "", 0))
    (home.folder / "node").mkdir()
    (home.folder / "node" / "supernode.log").write_text("made anew")
    site = load_site(site_file)
    change_list(list_path(site), load_secret(secret_path(site)), "77", withdrawn=True)
    Ledger(site.ledger).reserve(charge(1), ["p1", "p2"])
    return home, site_file


def everything(folder: Path) -> dict[str, bytes]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def test_a_hospitals_backup_puts_back_what_it_had(
    hospital: tuple[Home, Path], tmp_path: Path
) -> None:
    home, site_file = hospital
    before = everything(site_file.parent)
    client_backup.save(home, site_file, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    shutil.rmtree(site_file.parent)
    site_file.parent.mkdir()
    done = client_backup.restore(tmp_path / "b.tar", home.folder, site_file)
    after = everything(site_file.parent)
    log = after.pop("state/audit.jsonl")
    assert log.startswith(before.pop("state/audit.jsonl"))
    assert b"restored from a backup" in log.splitlines()[-1]
    gone = {name for name in before if name not in after}
    assert gone == {"cases.csv", "state/node/supernode.log", "privacy-ledger/lock"}
    assert {n: before[n] for n in after if n in before} == {
        n: after[n] for n in before if n in after
    }
    assert done.kept == ()
    modes = {(p.is_dir(), p.stat().st_mode & 0o777) for p in home.folder.rglob("*")}
    assert modes == {(False, 0o600), (True, 0o700)}
    assert home.enrolment().site == "north"
    assert len(Ledger(load_site(site_file).ledger).entries()) == 1


def test_a_ledger_that_has_survived_is_kept_and_an_older_one_is_refused(
    hospital: tuple[Home, Path], tmp_path: Path
) -> None:
    home, site_file = hospital
    ledger = Ledger(load_site(site_file).ledger)
    short = everything(ledger.folder)
    client_backup.save(home, site_file, tmp_path / "old.tar")
    ledger.reserve(charge(2), ["p1"])
    client_backup.save(home, site_file, tmp_path / "new.tar")
    shutil.rmtree(home.folder)
    done = client_backup.restore(tmp_path / "old.tar", home.folder, site_file)
    assert done.kept == (ledger.folder,)
    assert len(ledger.entries()) == 2
    shutil.rmtree(home.folder)
    for name, content in short.items():
        (ledger.folder / name).write_bytes(content)
    with pytest.raises(StorageError, match="cut short, put back or begun anew"):
        client_backup.restore(tmp_path / "new.tar", home.folder, site_file)
    assert not home.folder.exists()


def test_nothing_is_written_over(hospital: tuple[Home, Path], tmp_path: Path) -> None:
    home, site_file = hospital
    client_backup.save(home, site_file, tmp_path / "b.tar")
    with pytest.raises(ConfigError, match="not replaced"):
        client_backup.save(home, site_file, tmp_path / "b.tar")
    with pytest.raises(ConfigError, match="not empty"):
        client_backup.restore(tmp_path / "b.tar", home.folder, site_file)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"one\ntwo\nthr")
    made = backup.save(tmp_path / "b.tar", "k", [("x/a.jsonl", tmp_path / "a.jsonl")], {})
    assert list(made.files) == ["x/a.jsonl"]
    assert backup.opened(tmp_path / "b.tar", "k").text("x/a.jsonl") == b"one\ntwo\n"


def rewritten(path: Path, change: str) -> Path:
    """The archive with one thing wrong."""
    out = path.with_name(f"{change}.tar")
    with tarfile.open(path) as old, tarfile.open(out, "w") as new:
        for member in old:
            source = old.extractfile(member)
            assert source is not None
            content = source.read()
            if change == "no-manifest" and member.name == backup.MANIFEST:
                continue
            if change == "byte" and member.name == "x/a":
                content = b"B" + content[1:]
            if change == "missing" and member.name == "x/a":
                continue
            if change == "path" and member.name == "x/a":
                member.name = "x/../../a"
            if change == "link" and member.name == "x/a":
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            new.addfile(member, io.BytesIO(content))
    return out


@pytest.mark.parametrize("change", ["no-manifest", "byte", "missing", "path", "link", "cut"])
def test_a_damaged_or_changed_backup_is_refused_whole(tmp_path: Path, change: str) -> None:
    (tmp_path / "a").write_bytes(b"A" * 3000)
    backup.save(tmp_path / "b.tar", "k", [("x/a", tmp_path / "a")], {})
    if change == "cut":
        bad = tmp_path / "cut.tar"
        bad.write_bytes((tmp_path / "b.tar").read_bytes()[:2000])
    else:
        bad = rewritten(tmp_path / "b.tar", change)
    with pytest.raises(StorageError):
        backup.opened(bad, "k")
    assert backup.opened(tmp_path / "b.tar", "k").put_back("x", tmp_path / "new") == 1
    assert (tmp_path / "new" / "a").read_bytes() == b"A" * 3000
    with pytest.raises(ConfigError, match="not of other"):
        backup.opened(tmp_path / "b.tar", "other")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_sides_are_put_back_from_backups_and_go_on(world: World) -> None:
    """Backups of running services; then more is done, so that they are old; then both disks go."""
    listen = world.coordinator()
    server = world.start("server", "start", says="listening on")
    home = world.folder / "north"
    write_hospital(home, "north")
    options = ("--state", str(home / "state"), "--site", str(home / "site.toml"))
    state = options[:2]
    token = world.says("server", "invite", "north")["token"]
    world.done("client", "enrol", listen, "--token", token, *state)
    world.done("client", "studies", *state)
    world.done("client", "approve", "tiny", "--yes", *options)
    client = world.start("client", "start", *options, says="Connected")

    def run() -> dict[str, object]:
        made = world.says("server", "run", "tiny", "--wait", "300")
        assert (made["state"], made["sites"]) == ("done", ["north"])
        return dict(made)

    def shown() -> int:
        """The line of the coordinator's log that the hospital was shown last."""
        return int(json.loads((home / "state" / "coordinator_head.json").read_bytes())["n"])

    def lines() -> int:
        return len((world.fed / "audit.jsonl").read_bytes().splitlines())

    first = run()
    world.says("server", "backup", str(world.folder / "fed.tar"))
    world.says("client", "backup", str(world.folder / "north.tar"), *options)
    kept = lines()  # all that the backup has, and perhaps what came meanwhile
    second = run()
    until(lambda: shown() > kept)  # of what nobody was shown, nobody can miss anything

    # The coordinator's disk is gone.
    world.end(server, signal.SIGKILL)
    shutil.rmtree(world.fed)
    restored = world.says("server", "restore", str(world.folder / "fed.tar"))
    assert restored["sites"] == ["north"]
    server = world.start("server", "start", says="listening on")
    world.hears(client, "log of the coordinator had")
    world.done("server", "confirm-restore")  # until then no run starts
    held = world.done("server", "run", "tiny", "--wait", "3", code=6)
    assert "0 of the 1 sites" in held.stdout
    world.done("client", "accept-log", *state)
    world.hears(client, "Connected to")
    run()
    # The model of the first run is there, that of the second was never in the backup.
    got = ("server", "model", "get")
    world.done(*got, str(first["id"]), "--out", str(world.folder / "m.safetensors"))
    world.done(*got, str(second["id"]), "--out", str(world.folder / "n.safetensors"), code=2)
    assert world.says("server", "log", "--verify")["lines"] > 0

    # The hospital's disk is gone, and its backup is older still.
    world.end(client)
    shutil.rmtree(home / "state")
    shutil.rmtree(home / "privacy-ledger", ignore_errors=True)
    assert world.says("client", "restore", str(world.folder / "north.tar"), *options)["site"]
    refused = world.done("client", "start", *options, code=5)
    assert "accept-log north" in refused.stderr
    world.done("server", "accept-log", "north")
    client = world.start("client", "start", *options, says="Connected to")
    run()
    assert world.says("client", "audit", "verify", *state)["heads"] > 0
    log = (world.fed / "audit.jsonl").read_text().splitlines()
    told = [json.loads(line)["what"] for line in log]
    for what in (
        "restored from a backup",
        "log of a site was rolled back",
        "line lost in a restore",
    ):
        assert what in told
    assert told.count("log of a site was rolled back") == 1
    assert world.end(client) == 0
