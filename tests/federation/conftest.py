"""A small federation on this machine: one engine, and sites that are what a hospital starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from medfl.common import tunnel
from medfl.common.study import Study, load_study
from medfl.server import cli as server_cli

if TYPE_CHECKING:
    from medfl.server.engine import Engine

STUDY = """
name = "tiny"

[task]
kind = "risk"
classes = ["no", "yes"]

[record]
features = [{{ name = "a" }}, {{ name = "b" }}, {{ name = "c" }}]

[model]
name = "mlp"
options = {{ hidden = [{hidden}] }}

[training]
learning_rate = 0.1
batch_size = 8
local_steps = 4

[federation]
rounds = {rounds}
strategy = "fedprox"
options = {{ mu = 0.01 }}
min_sites = {min_sites}

[evaluation]
split = "hash"
test = 0.2
validation = 0.2
"""

# What the trainer process imports to find its hospital; `crash` names a file that kills it once.
FINDER = """
import json, os, signal
from pathlib import Path

from medfl.client.data.cohort import build_cohort
from medfl.client.hospital import Hospital
from medfl.client.secure_site import simulated_identity
from medfl.common.site import load_site
from medfl.common.study import load_study


def finder(argument):
    about = json.loads(argument)
    site, study = load_site(Path(about["site"])), load_study(Path(about["study"]))
    crash = Path(about["crash"])
    hospital = Hospital(
        name=site.name,
        study=study,
        load_cohort=lambda: build_cohort(
            site.data, study, cache=site.cache, site_key=site.name.encode()
        ),
        folder=Path(about["folder"]),
        policy=site.policy,
        identity=simulated_identity(site.name),
    )

    def find(context):
        assert context.run_config["study"] == study.digest
        if crash.exists():
            crash.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        slow = Path(about["slow"])
        if slow.exists():
            import time
            time.sleep(float(slow.read_text()))
        return hospital

    return find
"""


@dataclass
class SiteProcesses:
    """What runs at one hospital, without TLS: its name travels as gRPC metadata."""

    name: str
    folder: Path
    gateway: str
    study: Path
    channel: grpc.Channel = field(init=False)

    def start(self) -> None:
        from medfl.client.runner import Node, Runner, Trainer
        from medfl.client.tunnel import Forwarder

        self.channel = grpc.intercept_channel(
            grpc.insecure_channel(self.gateway, options=tunnel.GRPC_OPTIONS), _Named(self.name)
        )
        self.forwarder = Forwarder(self.channel)
        own = self.folder / "client"
        self.node = Node(self.forwarder, own)
        argument = {
            "site": str(self.folder / "site.toml"),
            "study": str(self.study),
            "folder": str(own / "state"),
            "crash": str(self.crash),
            "slow": str(self.slow),
        }
        self.trainer = Trainer.for_hospitals(
            "hospital_finder:finder", json.dumps(argument), own / "trainer.log"
        )
        self.runner = Runner(self.name, self.node, self.trainer, self.forwarder.mail)
        self.node.start(self.forwarder.start())
        self.runner.start()

    @property
    def crash(self) -> Path:
        """Where this file is, the trainer dies at its next task."""
        return self.folder / "crash"

    @property
    def slow(self) -> Path:
        """Seconds that the trainer waits before each task."""
        return self.folder / "slow"

    def stop(self) -> None:
        self.node.stop()
        self.runner.stop()
        self.forwarder.stop()
        self.channel.close()


class _Named(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor):
    def __init__(self, name: str) -> None:
        self._name = name

    def intercept_unary_unary(self, continuation, details, request):
        return continuation(self._named(details), request)

    def intercept_stream_unary(self, continuation, details, requests):
        return continuation(self._named(details), requests)

    def _named(self, details):
        return details._replace(metadata=[("site", self._name)])


def site_of(context: grpc.ServicerContext) -> str:
    """Instead of the certificate's name."""
    return str(dict(context.invocation_metadata())["site"])


@dataclass
class Small:
    """The federation of one test."""

    folder: Path
    names: tuple[str, ...]
    study_file: Path
    engine: Engine
    gateway: str
    sites: dict[str, SiteProcesses]
    server: grpc.Server

    def restart_coordinator(self) -> None:
        """End gateway and engine, and start them anew on the same folder and port."""
        from medfl.server.engine import Engine

        self.server.stop(grace=None).wait()
        self.engine.stop()
        time.sleep(1)
        self.engine = Engine(self.folder / "coordinator")
        self.engine.start()
        self.server = serve(self.engine, len(self.names), int(self.gateway.rsplit(":", 1)[1]))[0]

    @property
    def study(self) -> Study:
        return load_study(self.study_file)

    def wait(self, n: int | None = None, timeout_s: float = 60.0) -> None:
        """Until n sites are connected."""
        until(lambda: len(self.engine.roster.sites()) >= (n or len(self.names)), timeout_s)


def serve(engine: Engine, sites: int, port: int = 0) -> tuple[grpc.Server, int]:
    """A gateway without TLS, and its port."""
    server = grpc.server(ThreadPoolExecutor(4 + 2 * sites), options=tunnel.GRPC_OPTIONS)
    server.add_generic_rpc_handlers([engine.handlers(site_of)])
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until it is so; fails after the time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def write_hospitals(folder: Path, names: tuple[str, ...], n: int = 60) -> None:
    """Folders with site.toml and a table whose label depends on a and b."""
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        home = folder / name
        home.mkdir(parents=True)
        rows = ["patient,a,b,c,label"]
        for k in range(n + 10 * i):
            a, b, c = rng.normal(size=3)
            rows.append(f"p{k},{a:.4f},{b:.4f},{c:.4f},{'yes' if a - b > 0 else 'no'}")
        (home / "cases.csv").write_text("\n".join(rows))
        (home / "site.toml").write_text(
            f'name = "{name}"\n[data]\nformat = "table"\npath = "cases.csv"\n'
            f'[cache]\npath = "cache"\n[policy]\nmin_sum_sites = 2\n'
        )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Small]]:
    """small(names, rounds=3, more=""): engine and sites, started; ended after the test."""
    made: list[Small] = []

    def make(
        names: tuple[str, ...] = ("north", "south"),
        rounds: int = 3,
        min_sites: int = 1,
        hidden: str = "8",
        more: str = "",
    ) -> Small:
        from medfl.server.engine import Engine

        (tmp_path / "hospital_finder.py").write_text(FINDER)
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        data = tmp_path / "data"
        write_hospitals(data, names)
        study_file = tmp_path / "study.toml"
        text = STUDY.format(rounds=rounds, min_sites=min_sites, hidden=hidden)
        study_file.write_text(text + more)
        engine = Engine(tmp_path / "coordinator")
        engine.start()
        server, port = serve(engine, len(names))
        gateway = f"127.0.0.1:{port}"
        sites = {n: SiteProcesses(n, data / n, gateway, study_file) for n in names}
        world = Small(tmp_path, names, study_file, engine, gateway, sites, server)
        made.append(world)
        for site in sites.values():
            site.start()
        return world

    yield make
    for world in made:
        threads = [threading.Thread(target=s.stop) for s in world.sites.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for world in made:
        world.server.stop(grace=1).wait()
        world.engine.stop()


# --- the commands, in processes of their own ----------------------------------------------------

TINY = """
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
min_sites = 2
"""


@pytest.fixture
def fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a new federation, which medfl-server then finds by itself."""
    folder = tmp_path / "fed"
    monkeypatch.setenv("MEDFL_SERVER_FOLDER", str(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    assert server_cli.main(["init", str(folder), "--name", "Test", "--listen", listen]) == 0
    return folder


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., str]:
    """write_study(rounds=2): the path of a small study file; text is replaced by keyword."""

    def write(**replaced: str) -> str:
        text = TINY
        for old, new in replaced.items():
            text = text.replace(f"{old} = 2", new)
        (tmp_path / "study.toml").write_text(text)
        return str(tmp_path / "study.toml")

    return write


class Processes:
    """Commands in processes of their own; all are ended after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[subprocess.Popen[str]] = []
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def start(self, module: str, *argv: str, until: str = "") -> subprocess.Popen[str]:
        """Start; return once a line holds `until`."""
        process = subprocess.Popen(
            [sys.executable, "-m", f"medfl.{module}.cli", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )
        self.all.append(process)
        assert process.stdout is not None
        told = ""
        while until:
            line = process.stdout.readline()
            told += line
            assert line, told
            if until in line:
                break
        return process

    def done(self, module: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run to its end."""
        return subprocess.run(
            [sys.executable, "-m", f"medfl.{module}.cli", *argv],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=120,
            check=False,
        )

    def join(self, name: str, place: str = ".") -> list[str]:
        """Enrol a hospital with 60 made-up patients; returns its options."""
        home = self.folder / place / name
        home.mkdir(parents=True)
        points = np.random.default_rng(len(name)).normal(size=(60, 2))
        rows = [
            f"p{k},{a:.3f},{b:.3f},{'yes' if a > b else 'no'}" for k, (a, b) in enumerate(points)
        ]
        (home / "cases.csv").write_text("\n".join(["patient,a,b,label", *rows]))
        (home / "site.toml").write_text(
            f'name = "{name}"\n[data]\nformat = "table"\npath = "cases.csv"\n'
        )
        invited = json.loads(self.done("server", "invite", name, "--json").stdout)
        listen = json.loads(self.done("server", "status", "--json").stdout)["listen"]
        state = ["--state", str(home / "state")]
        token = ["--token", invited["token"]]
        enrolled = self.done("client", "enrol", listen, *token, *state, "--json")
        assert enrolled.returncode == 0, enrolled.stderr
        assert json.loads(enrolled.stdout)["fingerprint"] == invited["fingerprint"]
        return [*state, "--site", str(home / "site.toml")]

    @staticmethod
    def ended(process: subprocess.Popen[str], within_s: float = 30) -> int:
        """The exit code, once it has ended."""
        process.communicate(timeout=within_s)
        return process.returncode


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Where commands are started."""
    made = Processes(tmp_path)
    yield made
    for process in made.all:
        if process.poll() is None:
            process.kill()
        process.communicate()
