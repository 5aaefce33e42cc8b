"""Real processes under real users, and a coordinator for them to talk to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.processes import Started

STUDY = """
name = "tiny"
[task]
kind = "risk"
classes = ["no", "yes"]
[record]
features = [{ name = "a" }, { name = "b" }]
[model]
name = "logistic"
[training]
learning_rate = 0.1
batch_size = 8
local_steps = 4
[federation]
rounds = 2
min_sites = 1
"""
# This machine is shared: what takes two seconds alone may take a minute.
PATIENCE_S = 400.0


def free() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.2)


def write_hospital(home: Path, name: str) -> None:
    """site.toml and 60 made-up patients."""
    home.mkdir(exist_ok=True)
    points = np.random.default_rng(len(name)).normal(size=(60, 2))
    rows = [f"p{k},{a:.3f},{b:.3f},{'yes' if a > b else 'no'}" for k, (a, b) in enumerate(points)]
    (home / "cases.csv").write_text("\n".join(["patient,a,b,label", *rows]))
    (home / "site.toml").write_text(
        f'name = "{name}"\n[data]\nformat = "table"\npath = "cases.csv"\n[cache]\npath = "cache"\n'
    )


@dataclass
class World:
    """Commands in processes of their own, all ended after the test. fed: the coordinator's."""

    folder: Path
    environment: dict[str, str]
    all: list[Started] = field(default_factory=list)
    python: str = sys.executable

    @property
    def fed(self) -> Path:
        return self.folder / "fed"

    def start(self, *argv: str, says: str, by: tuple[str, ...] = (), **more: str) -> Started:
        """Start medfl-... in the foreground; return once it says so."""
        process = Started([*by, *self.command(argv)], self.folder, self.environment | more)
        self.all.append(process)
        self.hears(process, says)
        return process

    def hears(self, process: Started, says: str) -> None:
        """Wait for a line that holds `says`, after the last one that was waited for."""
        process.heard = process.wait_for(says, PATIENCE_S, process.heard)

    def done(
        self, *argv: str, by: tuple[str, ...] = (), code: int = 0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run to its end, which must be with this exit code."""
        done = subprocess.run(
            [*by, *self.command(argv)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment | more,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == code, (argv, done.returncode, done.stdout, done.stderr)
        return done

    def says(self, *argv: str, **more: Any) -> Any:
        """What a command prints as JSON."""
        return json.loads(self.done(*argv, "--json", **more).stdout)

    def end(self, process: Started, how: int = signal.SIGTERM) -> int:
        process.popen.send_signal(how)
        return process.ended(PATIENCE_S)

    def coordinator(self) -> str:
        """Make one and publish a study; returns where it will listen."""
        listen = free()
        self.done("server", "init", str(self.fed), "--name", "Test", "--listen", listen)
        (self.folder / "study.toml").write_text(STUDY)
        self.done("server", "study", "publish", "study.toml")
        return listen

    def command(self, argv: tuple[str, ...]) -> list[str]:
        return [self.python, "-m", f"medfl.{argv[0]}.cli", *argv[1:]]


@pytest.fixture
def world() -> Iterator[World]:
    # Not pytest's own folder, which no other user may enter.
    folder = Path(tempfile.mkdtemp(prefix="medfl-"))
    folder.chmod(0o711)
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment = kept | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MEDFL_SERVER_FOLDER": str(folder / "fed"),
    }
    made = World(folder, environment)
    yield made
    for process in reversed(made.all):
        if process.popen.poll() is None:
            process.popen.terminate()
            try:
                process.ended(20)
            except AssertionError:
                process.kill()
    shutil.rmtree(folder)
