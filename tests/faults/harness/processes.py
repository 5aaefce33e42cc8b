"""Commands in processes of their own, none of which is lost sight of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SPOILED = Path(__file__).with_name("spoiled.py")
# Every process of a world inherits this, so that one that is left over can be found.
MARK = "MEDFL_FAULTS_WORLD"


def until(condition: Callable[[], Any], within_s: float = 30.0, what: str = "it") -> Any:
    """What `condition` returns once that is true; fails after the time."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {within_s:g} s"
        time.sleep(0.1)
    return found


class Started:
    """A running command; its output is read as it comes."""

    def __init__(self, argv: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.popen = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env=dict(env),
        )
        self.killed = False
        self.lines: list[str] = []
        # How far a reader is who waits for one line after another.
        self.heard = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line)
        self.popen.stdout.close()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, within_s: float = 120.0, since: int = 0) -> int:
        """Until a line from number `since` on holds `text`; returns the next line's number."""
        end = time.monotonic() + within_s
        while True:
            for number, line in enumerate(self.lines[since:], since):
                if text in line:
                    return number + 1
            over = self.popen.poll() is not None and not self._reader.is_alive()
            assert not over, (
                f"ended with {self.popen.returncode} before it said {text!r}:\n{self.said}"
            )
            assert time.monotonic() < end, f"{text!r} was not said in {within_s:g} s:\n{self.said}"
            time.sleep(0.05)

    def ended(self, within_s: float = 60.0) -> int:
        """The exit code."""
        try:
            code = self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {within_s:g} s:\n{self.said}") from None
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """SIGKILL: nothing is said any more."""
        self.killed = True
        self.popen.kill()
        self.ended()

    def term(self, within_s: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.ended(within_s)


def argv_of(module: str, spoils: Mapping[str, Any], argv: tuple[str, ...]) -> list[str]:
    """medfl-server or medfl-client as it is, or as `spoiled.py` breaks it."""
    if not spoils:
        return [sys.executable, "-m", f"medfl.{module}.cli", *argv]
    return [sys.executable, str(SPOILED), module, json.dumps(dict(spoils)), *argv]


def marked(mark: str) -> list[int]:
    """Ids of the live processes of a world."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def zombies(mark: str) -> list[int]:
    """Dead children that a live process of a world has not taken leave of."""
    parents, found = set(marked(mark)), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                # "pid (name) state ppid ...": the name may hold anything.
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) in parents:
                    found.append(int(folder.name))
    return found


def children(pid: int, having: str = "") -> list[int]:
    """Ids of the live processes below one, whose command line holds `having`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(parent) == pid and state != "Z" and having in command:
                    found.append(int(folder.name))
    return found


def peak(pid: int) -> int:
    """The most bytes that a process has had resident."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
