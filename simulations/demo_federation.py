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
# The second trains under differential privacy.
NAMES = ("st-marien", "riverside", "hopital-nord")
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
_MODULES = {"medfl-server": "medfl.server.cli", "medfl-client": "medfl.client.cli"}
_COMMAND_S, _CONNECT_S, _END_S = 300.0, 120.0, 30.0


@dataclass
class Stage:
    """The terminal, and every process that was started on it."""

    console: Console
    width: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    followers: list[threading.Thread] = field(default_factory=list)
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
        for follower in self.followers:
            follower.join(1.0)


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
        lines = []
        with self._started(command) as process:
            for line in process.stdout or ():
                lines.append(line)
                self.stage.say(self, line)
        if process.returncode != 0:
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
            with process:  # closes the pipe, and waits
                for line in process.stdout or ():
                    self.stage.say(self, line)
                    if until in line:
                        there.set()

        follower = threading.Thread(target=follow, name=f"follow-{self.name}", daemon=True)
        self.stage.followers.append(follower)
        follower.start()
        end = time.monotonic() + _CONNECT_S
        while not there.wait(0.1):
            if process.poll() is not None or time.monotonic() > end:
                raise FederationError(f"{self.name}: {command} did not come up.")

    def _started(self, command: str) -> subprocess.Popen[str]:
        program, *arguments = command.split()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULES[program], *arguments],
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


@dataclass(frozen=True)
class World:
    """Who takes part."""

    stage: Stage
    coordinator: Speaker
    hospitals: tuple[Speaker, ...]


def run_demo(out: Path, *, seed: int = 42) -> Path:
    """Make hospitals below `out`, let them join, train, and end; returns the run's report.

    Raises:
        FederationError: a command did not end as it should.
        Interrupted: somebody stopped the demonstration. Its processes are ended in any case.
    """
    started = time.monotonic()
    with staged(out, Console(highlight=False)) as world:
        perform(world, seed)
        report = world.coordinator.folder / "report.html"
        pages = [report, world.hospitals[1].folder / "check.html"]
        world.stage.console.rule("Now")
        world.stage.console.print(
            "Open in a browser:\n"
            + "".join(f"  {page}\n" for page in pages)
            + f"Everybody's files, also the logs: {out.resolve()}\n"
            f"{time.monotonic() - started:.0f} s",
            soft_wrap=True,
        )
        return report


@contextmanager
def staged(out: Path, console: Console, *, small: bool = False) -> Iterator[World]:
    """A coordinator and three hospitals with a folder each; their processes end with the context.

    small: fewer cases and rounds, for tests.
    """
    if out.exists():
        shutil.rmtree(out)  # made by an earlier demonstration, and made again
    stage = Stage(console, max(map(len, ["coordinator", *NAMES])))
    console.rule("Three hospitals, as files")
    make_hospitals(out / "files", small=small, private="segmentation")
    for name in NAMES:
        shutil.move(out / "files" / "segmentation" / name, out / name)
        if small:
            with (out / name / "site.toml").open("a", encoding="utf-8") as file:
                file.write("\n[policy]\nsmallest_count = 1  # made up, and few\n")
    shutil.rmtree(out / "files")
    coordinator = _speaker(stage, out, "coordinator", 0, {"MEDFL_SERVER_FOLDER": "fed"})
    own = {"MEDFL_STATE": "state", "MEDFL_SITE": "site.toml"}
    hospitals = tuple(_speaker(stage, out, n, i, own) for i, n in enumerate(NAMES, start=1))
    study = STUDY.read_text(encoding="utf-8")
    (coordinator.folder / "study.toml").write_text(_shorter(study) if small else study)
    console.print(f"Everybody has a folder below {out}, and only there.", soft_wrap=True)
    with _ended(stage):
        yield World(stage, coordinator, hospitals)


def perform(world: World, seed: int) -> str:
    """All steps from the first key to the report; returns the run's name."""
    world.stage.console.rule("1. The coordinator makes a federation and invites")
    _join(world)
    world.stage.console.rule("3. A study is published; each hospital checks, reads and signs")
    _consent(world)
    world.stage.console.rule("4. The hospitals connect, and the study runs")
    run = _train(world, seed)
    world.stage.console.rule("5. What is left: a model, a report, and proof of what was done")
    _look_back(world, run)
    return run


def _join(world: World) -> None:
    coordinator, address = world.coordinator, _free_address()
    coordinator.does(f"medfl-server init fed --name Demo --listen {address} --address {address}")
    commands = {}
    for hospital in world.hospitals:
        lines = coordinator.does(f"medfl-server invite {hospital.name}", mask="medfl1.")
        commands[hospital.name] = next(x.strip() for x in lines if "medfl-client enrol" in x)
    coordinator.keeps("medfl-server start", until="listening on")
    world.stage.console.rule("2. Each hospital joins: its keys are made there and never leave")
    _at_once([(h, commands[h.name]) for h in world.hospitals], mask="medfl1.")


def _consent(world: World) -> None:
    first, private, _ = world.hospitals
    world.coordinator.does("medfl-server study publish study.toml")
    _at_once([(h, "medfl-client check --html check.html") for h in world.hospitals])
    first.does("medfl-client studies")
    private.does(f"medfl-client show {NAME}")
    agree(world, NAME)
    world.coordinator.does("medfl-server study list")


def agree(world: World, study: str) -> None:
    """Every hospital approves."""
    approval = f"medfl-client approve {study} --yes --days 30"
    _at_once([(h, approval) for h in world.hospitals])


def _train(world: World, seed: int) -> str:
    with ThreadPoolExecutor(len(world.hospitals)) as pool:
        starts = [pool.submit(h.keeps, "medfl-client start", "Connected") for h in world.hospitals]
    for started in starts:
        started.result()
    lines = world.coordinator.watches(f"medfl-server run {NAME} --seed {seed}")
    found = re.search(rf"{NAME}-[0-9]+-[0-9]+-[0-9a-f]+", "".join(lines))
    if found is None:
        raise FederationError("The run did not say its name.")
    return found.group()


def _look_back(world: World, run: str) -> None:
    coordinator, (first, private, _) = world.coordinator, world.hospitals
    coordinator.does(f"medfl-server model get {run} --out model.safetensors")
    coordinator.does("medfl-server log --verify")
    first.does("medfl-client audit verify")
    private.does("medfl-client budget")
    coordinator.does(f"medfl-server report {run} --out .")


def _at_once(jobs: Sequence[tuple[Speaker, str]], *, mask: str = "") -> None:
    """Commands of several speakers side by side, each shown in one piece."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = [pool.submit(who.does, command, mask=mask) for who, command in jobs]
    for each in done:
        each.result()


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
