"""What systemd is told."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

import pytest

from medfl.common.notify import tell


@pytest.mark.parametrize("abstract", [False, True])
def test_states_arrive_as_one_datagram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = secrets.token_hex(8) if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        assert tell("READY=1", "STATUS=listening")
        assert manager.recv(1000) == b"READY=1\nSTATUS=listening"


def test_without_a_manager_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not tell("READY=1")
