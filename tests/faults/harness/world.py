"""A federation of real processes on this machine: medfl-server, medfl-client, TLS on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.chaos import Chaos
from harness.processes import MARK, Started, argv_of, marked, until, zombies
from medfl.client import witness
from medfl.client.ledger import Head, Ledger
from medfl.client.premises import Home
from medfl.common import errors, tensors
from medfl.common.tensors import Array
from medfl.server import heads, runs
from medfl.server.federation import Federation
from medfl.server.runs import Run
from medfl.server.settings import open_federation

CODES = {0} | {
    kind.exit_code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MedflError)
}

STUDY = """
name = "{name}"
[task]
kind = "risk"
classes = ["no", "yes"]
[record]
features = [{{ name = "a", range = [-4, 4] }}, {{ name = "b", range = [-4, 4] }}]
scale = "range"
[model]
name = "{model}"
{options}
[training]
learning_rate = 0.1
batch_size = 8
local_steps = {steps}
[federation]
rounds = {rounds}
min_sites = {min_sites}
strategy = "{strategy}"
updates = "{updates}"
{more}
[evaluation]
validation = 0.2
test = 0.2
"""
# A patient's loss is bounded at this hospital.
PRIVATE = """
[privacy]
epsilon = 8.0
delta = 1e-3
declared_patients = 60
[privacy.budget]
epsilon = 12.0
delta = 1e-3
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Site:
    """One hospital: made-up patients, its own folder, and a proxy before the coordinator."""

    world: World
    name: str
    home: Path
    proxy: Chaos
    process: Started | None = None
    ledger_head: Head | None = None
    spoils: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def site_file(self) -> Path:
        return self.home / "site.toml"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.home / "privacy-ledger")

    @property
    def options(self) -> list[str]:
        return ["--state", str(self.state), "--site", str(self.site_file)]

    def done(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """A medfl-client command, run to its end."""
        return self.world.done("client", *argv, **more)

    def approve(self, study: str, days: int = 30) -> None:
        """Hear of it and sign it."""
        heard = self.done("studies", "--state", str(self.state))
        assert heard.returncode == 0, heard.stderr
        signed = self.done("approve", study, "--yes", "--days", str(days), *self.options)
        assert signed.returncode == 0, signed.stdout + signed.stderr

    def start(self, *, until_: str = "Connected", within_s: float = 150, **spoils: Any) -> Started:
        """medfl-client start; `spoils` break it as `spoiled.py` says."""
        self.process = self.world.start("client", "start", *self.options, **spoils)
        if until_:
            self.process.wait_for(until_, within_s)
        return self.process

    def audit(self) -> list[dict[str, Any]]:
        return list(Home(self.state).audit.lines())

    def trainer_log(self) -> str:
        file = self.state / "trainer.log"
        return file.read_text() if file.exists() else ""


@dataclass
class World:
    """A coordinator's folder, its hospitals, and every process that was started."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    sites: dict[str, Site] = field(default_factory=dict)
    started: list[Started] = field(default_factory=list)
    server: Started | None = None
    # Damaged on purpose by a case: not checked when it ends.
    spoilt: set[str] = field(default_factory=set)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", MARK: self.mark}

    @property
    def fed(self) -> Path:
        return self.folder / "fed"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @cached_property
    def federation(self) -> Federation:
        return open_federation(self.fed)

    # Commands -----------------------------------------------------------------------------------

    def done(
        self, module: str, *argv: str, within_s: float = 150, **spoils: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, which comes in time and with a documented code."""
        over = subprocess.run(
            argv_of(module, spoils, argv),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.env,
            timeout=within_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert over.returncode in CODES, (over.returncode, over.stdout, over.stderr)
        assert "Traceback" not in over.stderr, over.stderr
        return over

    def ask(self, *argv: str, **more: Any) -> Any:
        """What medfl-server says as JSON."""
        over = self.done("server", *argv, "--folder", str(self.fed), "--json", **more)
        assert over.returncode == 0, over.stdout + over.stderr
        return json.loads(over.stdout)

    def start(self, module: str, *argv: str, **spoils: Any) -> Started:
        """Start a command; it is watched until the world ends."""
        made = Started(argv_of(module, spoils, argv), self.folder, self.env)
        self.started.append(made)
        return made

    # The coordinator ----------------------------------------------------------------------------

    def init(self, **more: Any) -> None:
        """medfl-server init."""
        argv = ("init", str(self.fed), "--name", "Test", "--listen", self.address)
        made = self.done("server", *argv, **more)
        assert made.returncode == 0, made.stderr

    def serve(self, *, until_: str = "listening on", **spoils: Any) -> Started:
        """medfl-server start."""
        argv = ("start", "--folder", str(self.fed), "--verbose")
        self.server = self.start("server", *argv, **spoils)
        if until_:
            self.server.wait_for(until_, 150)
        return self.server

    def connected(self, *names: str, since: int = 0, within_s: float = 150) -> None:
        """Until these hospitals' nodes have arrived at the coordinator."""
        assert self.server is not None
        for name in names:
            self.server.wait_for(f"site={name} connected", within_s, since)

    def publish(self, name: str = "tiny", **more: Any) -> str:
        """Publish a small study; returns its digest."""
        file = self.folder / f"{name}.toml"
        file.write_text(study_text(name, **more))
        return str(self.ask("study", "publish", str(file))["digest"])

    def join(self, name: str, toml: str = "", n: int = 60, seed: int | None = None) -> Site:
        """Enrol a hospital with n made-up patients, through its own proxy."""
        home = self.folder / name
        write_hospital(home, name, n, sum(name.encode()) if seed is None else seed, toml)
        proxy = Chaos(self.address)
        site = self.sites[name] = Site(self, name, home, proxy)
        token = self.ask("invite", name)["token"]
        state = ("--state", str(site.state))
        made = site.done("enrol", proxy.address, "--token", token, *state)
        assert made.returncode == 0, made.stderr
        return site

    def run(self, study: str = "tiny", *, seed: int = 7, wait: int = 60, deadline: int = 60) -> str:
        """Ask for a run; returns its id."""
        argv = ("--seed", str(seed), "--wait", str(wait), "--deadline", str(deadline))
        return str(self.ask("run", study, *argv, "--detach")["run"])

    def state_of(self, run: str) -> Run:
        """The run as it is on disk now."""
        return runs.load(self.federation, run)

    def rounds(self, run: str) -> list[dict[str, Any]]:
        """Progress so far, one record a round."""
        return [asdict(record) for record in runs.progress(self.federation, run)]

    def reached(self, run: str, round_: int, within_s: float = 150) -> None:
        """Until the round is over."""

        def there() -> bool:
            now = self.state_of(run)
            assert now.state not in runs.OVER or now.round >= round_, now
            return now.round >= round_

        until(there, within_s, f"round {round_}")

    def over(self, run: str, within_s: float = 200) -> Run:
        """Until the run has ended, in whatever way."""

        def ended() -> Run | None:
            now = self.state_of(run)
            return now if now.state in runs.OVER else None

        found: Run = until(ended, within_s, "the run's end")
        return found

    def ends(self, run: str, within_s: float = 200, state: str = "done") -> Run:
        """The run, which ends like this; else what the coordinator said of it."""
        over = self.over(run, within_s)
        said = "" if self.server is None else self.server.said[-4000:]
        assert over.state == state, f"{over}\n{said}"
        return over

    def left_out(self, run: str) -> list[dict[str, str]]:
        """Who was left out and why, by round."""
        return [r["left_out"] for r in self.rounds(run)]

    def model(self, run: str) -> dict[str, Array]:
        """The published model."""
        return tensors.load(self.fed / "runs" / run / "model.safetensors")

    def audit(self) -> list[dict[str, Any]]:
        return list(self.federation.audit.lines())

    # What every case asserts --------------------------------------------------------------------

    def check(self) -> None:
        """Both chains verify, no ledger has shrunk, no child is left unburied."""
        if "coordinator" not in self.spoilt and (self.fed / "server.toml").exists():
            checked = heads.check(self.federation)
            assert checked.bad is None, f"coordinator's log: {checked.bad}"
        for site in self.sites.values():
            if site.name in self.spoilt:
                continue
            if (site.state / "enrolment.json").exists():
                seen = witness.check(Home(site.state))
                assert seen.bad is None, f"log of {site.name}: {seen.bad}"
            if site.ledger_head is not None:
                assert site.ledger.noticed(site.ledger_head) is None
            if (site.ledger.folder / "key").exists():
                site.ledger_head = site.ledger.head()
        with suppress(AssertionError):
            until(lambda: not zombies(self.mark), 5)
        assert zombies(self.mark) == []

    def close(self, within_s: float = 60) -> None:
        """End all; each ends in time with a documented code, and nothing is left behind."""
        try:
            self.check()
            for process in reversed(self.started):
                if process.popen.poll() is None:
                    process.popen.terminate()
            for process in reversed(self.started):
                code = process.ended(within_s)
                assert process.killed or code in CODES, f"exit code {code}:\n{process.said}"
                assert "Traceback" not in process.said, process.said
            self._verify()
            until(lambda: not marked(self.mark), 15, f"the end of {marked(self.mark)}")
        finally:
            self._sweep()

    def _verify(self) -> None:
        """As a person would."""
        if "coordinator" not in self.spoilt and (self.fed / "server.toml").exists():
            log = self.done("server", "log", "--verify", "--folder", str(self.fed))
            assert log.returncode == 0, log.stderr
        for site in self.sites.values():
            if site.name not in self.spoilt:
                log = site.done("audit", "verify", "--state", str(site.state))
                assert log.returncode == 0, log.stderr

    def _sweep(self) -> None:
        for site in self.sites.values():
            site.proxy.stop()
        for process in self.started:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
        for pid in marked(self.mark):
            with suppress(OSError):
                os.kill(pid, 9)


def study_text(
    name: str = "tiny",
    *,
    rounds: int = 3,
    steps: int = 4,
    min_sites: int = 1,
    strategy: str = "fedavg",
    updates: str = "float32",
    model: str = "logistic",
    options: str = "",
    more: str = "",
) -> str:
    """A risk from two numbers."""
    return STUDY.format(**locals())


def write_hospital(home: Path, name: str, n: int, seed: int, toml: str = "") -> None:
    """site.toml and a table whose label depends on both numbers."""
    home.mkdir(parents=True)
    points = np.random.default_rng(seed).normal(size=(n, 2))
    rows = [f"p{k},{a:.3f},{b:.3f},{'yes' if a > b else 'no'}" for k, (a, b) in enumerate(points)]
    (home / "cases.csv").write_text("\n".join(["patient,a,b,label", *rows]))
    top, tables = ("", toml) if toml.lstrip().startswith("[") else (toml, "")
    (home / "site.toml").write_text(
        f'name = "{name}"\n{top}\n[data]\nformat = "table"\npath = "cases.csv"\n{tables}\n'
    )


def federation_of(
    folder: Path,
    names: Sequence[str],
    study: Mapping[str, Any] | None = None,
    spoils: Mapping[str, Mapping[str, Any]] | None = None,
    server: Mapping[str, Any] | None = None,
    **toml: str,
) -> World:
    """A coordinator that listens, and sites that have approved the study "tiny" and are connected.

    spoils: by site, server: of the coordinator; as `spoiled.py` takes them.
    """
    world = World(folder)
    try:
        world.init()
        world.serve(**(server or {}))
        world.publish(**(study or {}))
        for name in names:
            world.join(name, toml.get(name, "")).approve("tiny")
        for site in world.sites.values():
            site.start(until_="", **(spoils or {}).get(site.name, {}))
        world.connected(*names)
    except BaseException:
        world._sweep()
        raise
    return world


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether two models are equal bit for bit."""
    return tensors.digest(one) == tensors.digest(other)


def seconds(since: float) -> str:
    """For the table."""
    return f"{time.monotonic() - since:.1f} s"
