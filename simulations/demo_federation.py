"""The demonstration of the real federation: one coordinator and three hospitals in one terminal.

Every line marked `$` is a command as a person would type it, run as a process of its own in the
folder of whoever speaks. Nothing is played: keys, TLS, signatures and training are the real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from medfl.common.errors import FederationError, Interrupted
from medfl.simulations.hospitals import make_hospitals

STUDY = Path(__file__).parent / "studies" / "demo_federation.toml"
NAME = "demo-federation"
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
_MODULES = {"medfl-server": "medfl.server.cli", "medfl-client": "medfl.client.cli"}
_COMMAND_S, _CONNECT_S, _END_S = 300.0, 120.0, 30.0


@dataclass
class Stage:
    """The terminal, and every process that was started on it."""

    console: Console
    width: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def say(self, who: Speaker, line: str, *, command: bool = False) -> None:
        """One line of somebody."""
        text = Text(f"{who.name:>{self.width}} ", style=who.colour)
        text.append("$ " if command else "| ", style="bold" if command else "dim")
        text.append(line.rstrip(), style="bold" if command else "")
        with self._lock:
            self.console.print(text, soft_wrap=True)

    def block(self, who: Speaker, command: str, lines: Sequence[str]) -> None:
        """A command and its output without others' lines between them."""
        with self._lock:
            self.say(who, command, command=True)
            for line in lines:
                self.say(who, line)

    def stop(self) -> None:
        """End every process that still runs: asked first, the last ones started first."""
        running = [p for p in reversed(self.processes) if p.poll() is None]
        for process in running:
            process.terminate()
        end = time.monotonic() + _END_S
        for process in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Speaker:
    """Somebody at a machine of their own, which here is a folder."""

    name: str
    folder: Path
    colour: str
    stage: Stage
    environment: dict[str, str]

    def does(self, command: str, *, mask: str = "", code: int = 0) -> list[str]:
        """Run a command to its end and show it with what it says; returns the lines.

        mask: part of the command that is too long for a screen.

        Raises:
            FederationError: it ends with another exit code than `code`.
        """
        process = self._started(command)
        try:
            out, _ = process.communicate(timeout=_COMMAND_S)
        except subprocess.TimeoutExpired:
            raise FederationError(f"{self.name}: {command} took too long.") from None
        lines = out.splitlines()
        self.stage.block(self, _masked(command, mask), [_masked(line, mask) for line in lines])
        if process.returncode != code:
            raise FederationError(
                f"{self.name}: {_masked(command, mask)} ended with {process.returncode}."
            )
        return lines

    def watches(self, command: str) -> list[str]:
        """Run a command to its end and show its lines as they come. Raises FederationError."""
        self.stage.say(self, command, command=True)
        process, lines = self._started(command), []
        for line in process.stdout or ():
            lines.append(line)
            self.stage.say(self, line)
        if process.wait() != 0:
            raise FederationError(f"{self.name}: {command} ended with {process.returncode}.")
        return lines

    def keeps(self, command: str, until: str) -> None:
        """Start a command that stays; its lines are shown. Returns when one holds `until`.

        Raises:
            FederationError: it ends, or does not come so far.
        """
        self.stage.say(self, command, command=True)
        process, there = self._started(command), threading.Event()

        def follow() -> None:
            for line in process.stdout or ():
                self.stage.say(self, line)
                if until in line:
                    there.set()

        threading.Thread(target=follow, name=f"follow-{self.name}", daemon=True).start()
        end = time.monotonic() + _CONNECT_S
        while not there.wait(0.1):
            if process.poll() is not None or time.monotonic() > end:
                raise FederationError(f"{self.name}: {command} did not come up.")

    def _started(self, command: str) -> subprocess.Popen[str]:
        program, *arguments = command.split()
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULES[program], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env={**os.environ, **self.environment},
            # Ctrl-C is for the demonstration, which ends them in order.
            start_new_session=True,
        )
        self.stage.processes.append(process)
        return process


def run_demo(out: Path, *, seed: int = 42, small: bool = False) -> Path:
    """Make hospitals below `out`, let them join, train, and end; returns the run's report.

    small: fewer cases and rounds, for tests.

    Raises:
        FederationError: a command did not end as it should.
        Interrupted: somebody stopped the demonstration. Its processes are ended in any case.
    """
    if out.exists():
        shutil.rmtree(out)  # made by an earlier demonstration, and made again
    console = Console(highlight=False)
    names = ["st-marien", "riverside", "hopital-nord"]
    stage = Stage(console, max(map(len, ["coordinator", *names])))
    console.rule("Three hospitals, as files")
    make_hospitals(out / "files", small=small)
    for name in names:
        shutil.move(out / "files" / "segmentation" / name, out / name)
    shutil.rmtree(out / "files")
    coordinator = _speaker(stage, out, "coordinator", 0, {"MEDFL_SERVER_FOLDER": "fed"})
    hospitals = [
        _speaker(stage, out, name, i, {"MEDFL_STATE": "state", "MEDFL_SITE": "site.toml"})
        for i, name in enumerate(names, start=1)
    ]
    study = STUDY.read_text(encoding="utf-8")
    (coordinator.folder / "study.toml").write_text(_shorter(study) if small else study)
    console.print(f"Everybody has a folder below {out}, and only there.", soft_wrap=True)
    with _ended(stage):
        _join(stage, coordinator, hospitals)
        _consent(stage, coordinator, hospitals)
        run = _train(stage, coordinator, hospitals, seed)
        return _look_back(stage, coordinator, hospitals, run)


def _join(stage: Stage, coordinator: Speaker, hospitals: Sequence[Speaker]) -> None:
    stage.console.rule("1. The coordinator makes a federation and invites")
    address = _free_address()
    coordinator.does(f"medfl-server init fed --name Demo --listen {address} --address {address}")
    commands = {}
    for hospital in hospitals:
        lines = coordinator.does(f"medfl-server invite {hospital.name}", mask="medfl1.")
        commands[hospital.name] = next(x.strip() for x in lines if "medfl-client enrol" in x)
    coordinator.keeps("medfl-server start", until="listening on")
    stage.console.rule("2. Each hospital joins: its keys are made there and never leave")
    for hospital in hospitals:
        hospital.does(commands[hospital.name], mask="medfl1.")


def _consent(stage: Stage, coordinator: Speaker, hospitals: Sequence[Speaker]) -> None:
    stage.console.rule("3. A study is published; each hospital checks, reads and signs")
    coordinator.does("medfl-server study publish study.toml")
    _at_once(hospitals, "medfl-client check")
    hospitals[0].does("medfl-client studies")
    # The one that trains under differential privacy.
    hospitals[1].does(f"medfl-client show {NAME}")
    _at_once(hospitals, f"medfl-client approve {NAME} --yes --days 30")
    coordinator.does("medfl-server study list")


def _train(stage: Stage, coordinator: Speaker, hospitals: Sequence[Speaker], seed: int) -> str:
    stage.console.rule("4. The hospitals connect, and the study runs")
    with ThreadPoolExecutor(len(hospitals)) as pool:
        for done in [pool.submit(h.keeps, "medfl-client start", "Connected") for h in hospitals]:
            done.result()
    lines = coordinator.watches(f"medfl-server run {NAME} --seed {seed}")
    found = re.search(rf"{NAME}-[0-9a-f-]+", "".join(lines))
    if found is None:
        raise FederationError("The run did not say its name.")
    return found.group()


def _look_back(stage: Stage, coordinator: Speaker, hospitals: Sequence[Speaker], run: str) -> Path:
    stage.console.rule("5. What is left: a model, a report, and proof of what was done")
    coordinator.does(f"medfl-server model get {run} --out model.safetensors")
    coordinator.does(f"medfl-server report {run} --out .")
    coordinator.does("medfl-server log --verify")
    hospitals[0].does("medfl-client audit verify")
    hospitals[1].does("medfl-client budget")
    report = coordinator.folder / "report.html"
    stage.console.rule("Now")
    stage.console.print(
        f"Open in a browser:\n  {report}\n  {hospitals[1].folder / 'check.html'}\n"
        f"Everybody's files, also the logs: {report.parent.parent}",
        soft_wrap=True,
    )
    return report


def _at_once(hospitals: Sequence[Speaker], command: str) -> None:
    with ThreadPoolExecutor(len(hospitals)) as pool:
        for done in [pool.submit(h.does, command) for h in hospitals]:
            done.result()


@contextmanager
def _ended(stage: Stage) -> Iterator[None]:
    """Whatever happens in here, no process is left."""

    def stop(*_: object) -> None:
        raise Interrupted("The demonstration was stopped.")

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("The demonstration was stopped.") from None
    finally:
        stage.console.rule("Ending the server and the clients")
        stage.stop()
        if main:
            signal.signal(signal.SIGTERM, before)


def _speaker(stage: Stage, out: Path, name: str, place: int, settings: dict[str, str]) -> Speaker:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    return Speaker(name, folder.resolve(), _COLOURS[place], stage, {**quiet, **settings})


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _shorter(study: str) -> str:
    study = re.sub(r"(?m)^rounds = .*$", "rounds = 2", study)
    return re.sub(r"(?m)^local_steps = .*$", "local_steps = 2", study)


def _masked(text: str, mask: str) -> str:
    return re.sub(rf"{re.escape(mask)}\S{{24}}\S+", f"{mask}…", text) if mask else text
