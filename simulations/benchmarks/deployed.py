"""A federation as people set it up: `medfl-server` and one `medfl-client` a hospital, with TLS."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl.common import tensors
from medfl.common.tensors import Array
from medfl.simulations.benchmarks.processes import (
    Processes,
    command_of,
    descendants,
    free_port,
    peak_bytes,
    wait,
)
from medfl.simulations.benchmarks.work import SEED, Work, write_hospital


@dataclass(frozen=True, slots=True)
class Ended:
    """A run: its rounds as the coordinator recorded them, and its model."""

    rounds: list[dict[str, Any]]
    weights: dict[str, Array]


class Deployed:
    """Coordinator and hospitals, from `start` to `end`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.processes = Processes(folder, {"MEDFL_SERVER_FOLDER": str(folder / "fed")})
        self.address = f"127.0.0.1:{free_port()}"
        self._server = 0

    def start(self) -> None:
        """The coordinator, without hospitals."""
        self.server("init", str(self.folder / "fed"), "--name", "Bench", "--listen", self.address)
        self._server = self.processes.start("server", *_medfl("server"), "start").pid
        self.processes.until("server", "listening on")

    def publish(self, work: Work) -> None:
        """The study that hospitals then approve."""
        work.write_study(self.folder / "study.toml")
        self.server("study", "publish", "study.toml")

    def enrol(self, name: str, site: int) -> list[str]:
        """A hospital with its data, enrolled; returns its options."""
        file = write_hospital(self.folder / name, name, site)
        token = json.loads(self.server("invite", name, "--json"))["token"]
        state = ["--state", str(self.folder / name / "state")]
        self.client("enrol", self.address, "--token", token, *state)
        return [*state, "--site", str(file)]

    def join(self, name: str, site: int) -> None:
        """Enrol, approve the published study, and start the hospital's client."""
        options = self.enrol(name, site)
        self.client("studies", *options[:2])
        self.client("approve", "benchmark", "--yes", *options)
        self.processes.start(name, *_medfl("client"), "start", *options)
        self.processes.until(name, "Connected")

    def run(self) -> Ended:
        """One run of the published study."""
        told = json.loads(self.server("run", "benchmark", "--seed", str(SEED), "--json"))
        model = self.folder / "model.safetensors"
        self.server("model", "get", told["id"], "--out", str(model))
        lines = (self.folder / "fed" / "runs" / told["id"] / "progress.jsonl").read_text()
        rounds = [json.loads(line) for line in lines.splitlines()]
        return Ended([r for r in rounds if r["round"] <= told["rounds"]], tensors.load(model))

    def peaks(self) -> dict[str, int]:
        """The most bytes that the coordinator's processes have had: its own, and the engine's."""
        pids = descendants(self._server)
        engine = [pid for pid in pids[1:] if "medfl.server.superlink" in command_of(pid)]
        return {"coordinator": peak_bytes(pids[0]), "engine": sum(map(peak_bytes, engine))}

    def end(self) -> None:
        """All processes."""
        self.processes.end()

    def server(self, *argv: str) -> str:
        """`medfl-server` to its end."""
        return self.processes.done("medfl-server", *_medfl("server"), *argv)

    def client(self, *argv: str) -> str:
        """`medfl-client` to its end."""
        return self.processes.done("medfl-client", *_medfl("client"), *argv)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until it is so."""
        wait(condition, what)


def _medfl(side: str) -> list[str]:
    return [sys.executable, "-m", f"medfl.{side}.cli"]
