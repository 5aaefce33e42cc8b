"""medfl-server and medfl-client as people use them, up to real processes."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client import cli as client_cli
from medfl.common import tensors
from medfl.server import cli as server_cli
from medfl.server import runs
from medfl.server.settings import open_federation


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    """What medfl-server prints as JSON."""
    capsys.readouterr()
    assert server_cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for main, commands in (
        (
            server_cli.main,
            "init invite start status sites runs log stop revoke renew run "
            "resume study.publish study.list model.get report plan-without",
        ),
        (
            client_cli.main,
            "enrol check studies show approve withdraw start status log audit.verify diagnose "
            "budget exclude lineage deid accept-key",
        ),
    ):
        for command in commands.split():
            assert main([*command.split("."), "--help"]) == 0
            out = capsys.readouterr().out
            assert "Example: medfl-" in out, command
            assert "\\[" not in out, command
    client_cli.main(["enrol", "--help"])
    assert capsys.readouterr().out.count("host:port of the coordinator.") == 1


def test_init_says_the_next_step_and_is_idempotent(
    fed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server_cli.main(["init", str(fed), "--name", "Test"]) == 0
    out = capsys.readouterr().out
    assert "Next: medfl-server invite" in out
    before = (fed / "keys" / "authority.pem").read_bytes()
    made = said(capsys, "init", str(fed), "--name", "Other")
    assert (made["made"], made["name"]) == (False, "Test")
    assert (fed / "keys" / "authority.pem").read_bytes() == before
    assert made["fingerprint"] in out


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["invite", "Bad Name"], 2),
        (["revoke", "nobody"], 2),
        (["study", "publish", "nowhere.toml"], 2),
        (["run", "nothing"], 2),
        (["plan-without", "nobody"], 2),
        (["model", "get", "nothing", "--out", "x"], 2),
        (["model", "get", "../../keys", "--out", "x"], 2),
        (["stop", "nothing"], 2),
        (["nonsense"], 2),
        (["log", "--verify"], 0),
        (["stop"], 0),
        (["status"], 0),
    ],
)
def test_exit_codes_are_as_documented(fed: Path, argv: list[str], code: int) -> None:
    assert server_cli.main(argv) == code


def test_a_folder_that_is_none_is_said_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server_cli.main(["status", "--folder", str(tmp_path / "x")]) == 2
    assert "medfl-server init" in capsys.readouterr().err
    assert client_cli.main(["status", "--state", str(tmp_path / "x")]) == 2
    assert "medfl-client enrol" in capsys.readouterr().err


def test_a_damaged_log_is_exit_code_7_and_names_the_line(
    fed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server_cli.main(["invite", "a"])
    file = fed / "audit.jsonl"
    file.write_bytes(file.read_bytes().replace(b"invited", b"invitee"))
    assert server_cli.main(["log", "--verify"]) == 7
    assert "line 2 was changed" in capsys.readouterr().err


def test_invitations_and_publications_are_listed(
    fed: Path, write_study: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    token = said(capsys, "invite", "st-marys")
    assert token["command"].startswith("medfl-client enrol COORDINATOR:")
    assert said(capsys, "sites")["sites"][0]["status"] == "invited"
    first = said(capsys, "study", "publish", write_study())
    assert said(capsys, "study", "publish", write_study()) == first
    assert said(capsys, "study", "list")["studies"][0]["digest"] == first["digest"]
    asked = said(capsys, "run", "tiny", "--detach")
    assert said(capsys, "run", "tiny", "--detach") == asked
    (only,) = said(capsys, "runs")["runs"]
    assert (only["state"], only["rounds"]) == ("waiting", 2)
    assert server_cli.main(["model", "get", only["id"], "--out", "x"]) == 2


def test_a_model_is_handed_out_only_as_it_was_written(
    fed: Path,
    tmp_path: Path,
    write_study: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    said(capsys, "study", "publish", write_study())
    run_id = said(capsys, "run", "tiny", "--detach")["run"]
    federation = open_federation(fed)
    file = runs.folder_of(federation, run_id) / "model.safetensors"
    tensors.save({"w": np.ones(3, np.float32)}, file)
    from dataclasses import replace

    run = replace(runs.load(federation, run_id), model=runs.sha256(file))
    runs.save(federation, run)
    out = tmp_path / "model.safetensors"
    assert said(capsys, "model", "get", run_id, "--out", str(out))["sha256"] == run.model
    np.testing.assert_array_equal(tensors.load(out)["w"], np.ones(3, np.float32))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert server_cli.main(["model", "get", run_id, "--out", str(out)]) == 7


def test_the_clients_settings_come_from_file_then_environment_then_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def folder(*argv: str) -> str:
        capsys.readouterr()
        assert client_cli.main(["status", *argv]) == 2
        return capsys.readouterr().err.split(":")[1].strip()

    (tmp_path / "client.toml").write_text('state = "from-file"\ndays = 3\n')
    monkeypatch.setenv("MEDFL_CLIENT_TOML", str(tmp_path / "client.toml"))
    assert folder() == str(tmp_path / "from-file")
    monkeypatch.setenv("MEDFL_STATE", "from-environment")
    assert folder() == "from-environment"
    assert folder("--state", "from-flag") == "from-flag"
    (tmp_path / "client.toml").write_text('stat = "x"\n')
    assert client_cli.main(["status"]) == 2
    assert "did you mean state" in capsys.readouterr().err
    (tmp_path / "client.toml").unlink()
    assert client_cli.main(["status"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["start", "approve"])
def test_a_policy_that_everybody_can_write_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    site = tmp_path / "site.toml"
    site.write_text('name = "a"\n[data]\nformat = "table"\npath = "x.csv"\n')
    site.chmod(0o666)
    argv = [command, *(["tiny"] if command == "approve" else []), "--site", str(site)]
    assert client_cli.main([*argv, "--state", str(tmp_path / "state")]) == 2
    assert "every user of this machine may change it" in capsys.readouterr().err


@pytest.mark.slow
def test_from_invitation_to_model_in_real_processes(
    fed: Path, processes: Any, write_study: Callable[..., str]
) -> None:
    work = processes
    server = work.start("server", "start", until="listening on")
    second = work.done("server", "start")
    assert second.returncode == 7
    assert "another medfl-server runs" in second.stderr
    write_study()
    assert work.done("server", "study", "publish", "study.toml").returncode == 0
    clients = {}
    for name in ("north", "south"):
        options = work.join(name)
        state = options[:2]
        assert "tiny" in work.done("client", "studies", *state).stdout
        unasked = work.done("client", "approve", "tiny", *options)
        assert unasked.returncode == 2
        signed = work.done("client", "approve", "tiny", "--yes", "--days", "30", *options)
        assert signed.returncode == 0, signed.stderr
        clients[name] = (work.start("client", "start", *options, until="Connected"), options)
    double = work.done("client", "start", *clients["north"][1])
    assert double.returncode == 7
    run = work.done("server", "run", "tiny", "--wait", "60", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)
    assert (result["state"], result["round"], result["sites"]) == ("done", 2, ["north", "south"])
    got = work.done("server", "model", "get", result["id"], "--out", "m.safetensors")
    assert got.returncode == 0
    assert tensors.load(work.folder / "m.safetensors")
    assert work.done("server", "log", "--verify").returncode == 0
    assert work.done("client", "audit", "verify", *clients["north"][1][:2]).returncode == 0
    # Both sides know which rounds used the hospital's cohort.
    kept = (work.folder / "north" / ".medfl-lineage.jsonl").read_text().splitlines()
    cohort, *rounds = (json.loads(line) for line in kept)
    assert [(r["run"], r["round"], r["cohort"]) for r in rounds] == [
        (result["id"], n, cohort["cohort"]) for n in (1, 2)
    ]
    plan = json.loads(work.done("server", "plan-without", cohort["cohort"], "--json").stdout)
    (affected,) = plan["affected"]
    assert (affected["run"], affected["sites"], affected["rounds"]) == (
        result["id"], ["north"], [1, 2],
    )  # fmt: skip
    assert affected["models"]["1"] == rounds[1]["model"]
    # Revoked: the running client ends by itself, and says so by its exit code.
    assert work.done("server", "revoke", "south").returncode == 0
    assert work.ended(clients["south"][0]) == 5
    # A quorum that is not there is named.
    missing = work.done("server", "run", "tiny", "--wait", "2")
    assert missing.returncode == 6
    assert "1 of the 2 sites" in missing.stdout
    for process in (clients["north"][0], server):
        process.send_signal(signal.SIGTERM)
        assert work.ended(process) == 0


@pytest.mark.slow
def test_a_hospital_that_takes_no_part_is_named_with_its_reason(
    fed: Path, processes: Any, write_study: Callable[..., str]
) -> None:
    """One has never approved, one has changed its site.toml since; two train."""
    work = processes
    server = work.start("server", "start", until="listening on")
    write_study()
    assert work.done("server", "study", "publish", "study.toml").returncode == 0
    work.join("absent")
    for name in ("north", "south", "west"):
        options = work.join(name)
        assert work.done("client", "studies", *options).returncode == 0
        assert work.done("client", "approve", "tiny", "--yes", *options).returncode == 0
        work.start("client", "start", *options, until="Connected")
    site = work.folder / "west" / "site.toml"
    site.write_text(site.read_text() + "[policy]\nround_metrics_to = 2\n")
    run = work.done("server", "run", "tiny", "--wait", "60")
    assert run.returncode == 0, run.stdout + run.stderr
    why = "west (no approval that holds at the hospital)"
    assert "Without: absent (the study is not approved here)" in run.stdout
    assert why in run.stdout
    assert f"without {why}" in work.done("server", "runs").stdout
    shown = work.done("client", "status", *options)
    assert "site.toml has changed since the approval" in shown.stdout, shown.stdout
    server.send_signal(signal.SIGTERM)
    assert work.ended(server) == 0


@pytest.mark.slow
def test_the_server_ends_on_sigterm_and_leaves_nothing_running(fed: Path, processes: Any) -> None:
    server = processes.start("server", "start", until="listening on")
    children = children_of(server.pid)
    assert children
    started = time.monotonic()
    assert processes.done("server", "stop").returncode == 0
    assert processes.ended(server) == 0
    assert time.monotonic() - started < 30
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert not (fed / "state" / "server.pid").exists()


def children_of(pid: int) -> list[int]:
    return [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and f"PPid:\t{pid}\n" in _status(p)
    ]


def _status(folder: Path) -> str:
    try:
        return (folder / "status").read_text()
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
