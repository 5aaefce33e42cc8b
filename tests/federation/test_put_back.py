"""A coordinator's state that was put back: what it does not know, it does not claim."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medfl.common.audit import AuditLog, verify
from medfl.common.study import Study
from medfl.server import authority, backup, runs, service, studies
from medfl.server.cli import main
from medfl.server.federation import Federation
from medfl.server.runs import Run
from medfl.server.settings import ServerSettings, open_federation


def test_a_restored_state_cancels_open_invitations_and_warns_until_confirmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was: a token used after the backup enrolled again, and nobody was told."""
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    authority.invite(federation, "a", 24)
    backup.save(federation, tmp_path / "backup.tar")
    assert len(authority.anchors(federation)) == 1
    assert backup.unconfirmed(federation) == []
    _, again = backup.restore(tmp_path / "backup.tar", tmp_path / "again")
    assert authority.anchors(again) == []
    folder = ["--folder", str(again.folder)]
    assert main(["status", *folder]) == 0
    assert "put back from a backup" in capsys.readouterr().out
    assert main(["confirm-restore", *folder]) == 0
    assert "restore confirmed" in [e["what"] for e in again.audit.lines()]
    capsys.readouterr()
    assert main(["status", *folder]) == 0
    assert "put back" not in capsys.readouterr().out


def test_no_run_starts_on_a_state_that_was_put_back_until_somebody_has_confirmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], risk_study: Callable[..., Study]
) -> None:
    """As it was: a hospital revoked since the backup was asked again, beside a warning."""
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    made = studies.publish(federation, risk_study())
    backup.save(federation, tmp_path / "backup.tar")
    _, again = backup.restore(tmp_path / "backup.tar", tmp_path / "again")
    run = runs.ask(again, made, 2, seed=1, wait_s=60, deadline_s=60)
    worked, stopping = list[str](), threading.Event()

    def looked(federation: Federation, engine: object, run: Run, *more: object) -> None:
        worked.append(run.id)
        stopping.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "_supervised", looked)
        patch.setattr(service, "_LOOK_S", 0.01)
        waits = threading.Thread(target=service._work, args=(again, None, stopping, 0.0))
        waits.start()
        folder = ["--folder", str(again.folder)]
        assert main(["runs", *folder]) == 0
        assert "nothing runs until somebody has compared" in capsys.readouterr().out
        assert worked == []
        assert main(["confirm-restore", *folder]) == 0
        waits.join(30)
    assert worked == [run.id]


def test_a_log_that_is_put_aside_during_a_backup_is_whole_in_it(tmp_path: Path) -> None:
    """As it was: the file put aside between two copies was in no copy."""
    authority.init(tmp_path / "fed", ServerSettings(name="Test"), time.time())
    federation = open_federation(tmp_path / "fed")
    small = AuditLog(federation.audit.path, max_file=600)
    for number in range(12):
        small.append("event", {"number": number})
    items = backup._items(federation)
    copied = [next(items) for _ in range(3)]
    for number in range(12, 30):  # several files are put aside meanwhile
        small.append("event", {"number": number})
    copied += list(items)
    names = [name for name, _ in copied]
    assert len(set(names)) == len(names)
    for name, path in copied:
        place = tmp_path / "copy" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    assert verify(tmp_path / "copy" / "fed" / "audit.jsonl") is None
    kept = [e["about"] for e in AuditLog(tmp_path / "copy" / "fed" / "audit.jsonl").lines()]
    assert {"number": 29} in kept


def test_nothing_is_added_while_the_log_is_held(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("one", {})
    with log.held() as files:
        waits = threading.Thread(target=log.append, args=("two", {}))
        waits.start()
        assert len(files[-1].read_bytes().splitlines()) == 1
    waits.join(30)
    assert [line["what"] for line in log.lines()] == ["one", "two"]
