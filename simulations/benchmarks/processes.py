"""Commands as processes of their own, each with a log, ended by pid; and what memory they take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server

from medfl.common.errors import FederationError

_WAIT_S = 600.0


@dataclass(slots=True)
class Processes:
    """All that a benchmark has started. folder: of the logs. marker: in every environment."""

    folder: Path
    env: Mapping[str, str]
    _all: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start one; what it writes is in `name`.log."""
        with self._log(name).open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={**self._environment(), **self.env},
            )
        self._all.append(process)
        return process

    def done(self, name: str, *command: str) -> str:
        """Run one to its end; returns what it wrote to its standard output.

        Raises:
            FederationError: it failed, or took more than ten minutes.
        """
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**self._environment(), **self.env},
            timeout=_WAIT_S,
            check=False,
        )
        if ended.returncode != 0:
            raise FederationError(f"{name} failed: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        return ended.stdout

    def until(self, name: str, said: str) -> None:
        """Wait until a process has written `said`. Raises FederationError."""
        wait(
            lambda: said in self._log(name).read_text("utf-8", "replace"),
            f"{name}: {said}",
            _WAIT_S,
        )

    def end(self) -> None:
        """SIGTERM, then SIGKILL, to those started here."""
        for process in self._all:
            if process.poll() is None:
                process.terminate()
        for process in self._all:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @staticmethod
    def _environment() -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        return {**os.environ, **quiet, "PATH": path, "OMP_NUM_THREADS": "1"}


def wait(condition: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    """Until it is so. Raises FederationError after the time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise FederationError(f"Did not happen within {limit_s:.0f} s: {what}")
        time.sleep(0.05)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def with_setting(setting: str) -> list[int]:
    """Processes that have this text in their environment, whoever started them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if setting.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def end_all(setting: str) -> None:
    """End the processes that have this text in their environment, by pid."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in with_setting(setting):
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        end = time.monotonic() + 10
        while with_setting(setting) and time.monotonic() < end:
            time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    """The process and all that it has started."""
    found = [pid]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found.extend(int(child) for child in file.read_text().split())
    return found


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had (VmHWM); 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def anonymous_bytes(pid: int) -> int:
    """The memory of a process that is no file's (RssAnon); 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def own_bytes(pid: int) -> int:
    """Memory of a process now, shared pages by their share (PSS); 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def command_of(pid: int) -> str:
    """Its command line."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
