"""A coordinator's state that was put back: what it does not know, it does not claim."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from medfl.server import authority, backup
from medfl.server.cli import main
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
