"""Flower's and FLARE's simulators on the benchmark `simulation`, each in its own environment.

Both are spared the final evaluation, and everything that medfl checks and writes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import medfl
from medfl.common.errors import FederationError
from medfl.simulations.benchmarks.plain import Weights
from medfl.simulations.benchmarks.processes import Processes, end_all, free_port, wait
from medfl.simulations.benchmarks.stock import write_app
from medfl.simulations.cli import default_cache

# Trains as the files of a folder say, and returns the final model. Raises FederationError.
Rival = Callable[[Path], Weights]

_FLOWER = ("flwr[simulation]==1.41.*", "safetensors", "monai==1.6.1")
_FLARE = ("nvflare==2.9.0", "safetensors", "monai==1.6.1")
# A process a site and round: 16 sites take minutes, and 64 a quarter of an hour.
FLARE_MOST = 16


def installed() -> dict[str, Rival | str]:
    """The rivals by name; a text says why one cannot be installed."""
    found: dict[str, Rival | str] = {}
    for name, packages, run in (("flower", _FLOWER, flower), ("flare", _FLARE, flare)):
        try:
            python = environment(name, packages)
        except FederationError as error:
            found[name] = str(error)
        else:
            found[name] = _bound(run, python)
    return found


def _bound(run: Callable[[Path, Path], Weights], python: Path) -> Rival:
    return lambda folder: run(python, folder)


def environment(name: str, packages: tuple[str, ...]) -> Path:
    """The python of an environment with these packages, made where it is not there yet."""
    folder = Path(os.environ.get("MEDFL_RIVALS", default_cache() / "rivals")) / name
    python = folder / "bin" / "python"
    ready = folder / "installed.txt"
    if ready.exists() and ready.read_text() == "\n".join(packages):
        return python
    _done(sys.executable, "-m", "venv", "--clear", str(folder))
    script = Path(medfl.__file__).resolve().parents[2] / "deploy" / "install-torch.sh"
    torch = version("torch").partition("+")[0]
    _done(
        *([str(script), str(python)] if script.exists() else []) or _pip(python, f"torch=={torch}")
    )
    _done(*_pip(python, *packages))
    ready.write_text("\n".join(packages))
    return python


def _pip(python: Path, *packages: str) -> list[str]:
    return [str(python), "-m", "pip", "install", "--quiet", *packages]


def _done(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise FederationError(f"{command[0]} failed: {ended.stderr[-500:]}")


def model_of(file: Path) -> Weights:
    """A model as the rivals leave it."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


_CLIENT = """
import functools
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from sim import images

app = ClientApp()


@functools.cache
def data(folder):
    torch.set_num_threads(1)
    found = images.Data(Path(folder))
    return found, images.network(found.work["model"])


@app.train()
def train(message, context):
    found, model = data(context.run_config["folder"])
    weights = message.content["arrays"].to_torch_state_dict()
    round_ = message.content["config"]["server-round"]
    site = int(context.node_config["partition-id"])
    after, cases = images.round_at(found, model, weights, site, round_)
    metrics = MetricRecord({"num-examples": cases})
    content = RecordDict({"arrays": ArrayRecord(after), "metrics": metrics})
    return Message(content, reply_to=message)
"""

_SERVER = """
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from sim import images

app = ServerApp()


@app.main()
def main(grid, context):
    folder = Path(context.run_config["folder"])
    found = images.Data(folder)
    sites = found.work["sites"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(found.first), num_rounds=found.work["rounds"]
    )
    weights = result.arrays.to_torch_state_dict()
    np.savez(folder / "flower.part.npz", **{n: t.numpy() for n, t in weights.items()})
    (folder / "flower.part.npz").rename(folder / "flower.npz")
"""


def flower(python: Path, folder: Path) -> Weights:
    """`flwr run` on Flower's simulation runtime; two sites at a time, as Ray gives each a core."""
    import json

    sites = json.loads((folder / "work.json").read_text())["sites"]
    app, home = folder / "sim-bench", folder / "flwr-home"
    for old in (app, home):
        shutil.rmtree(old, ignore_errors=True)
    write_app(app, "sim", 'folder = ""', _CLIENT, _SERVER)
    home.mkdir()
    shutil.copyfile(Path(__file__).with_name("images.py"), app / "sim" / "images.py")
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    env = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": path,
    }
    out = folder / "flower.npz"
    out.unlink(missing_ok=True)
    processes = Processes(folder, env)
    size = f"num-supernodes={sites} client-resources-num-cpus=1"
    try:
        processes.done(
            "flwr run",
            *(str(python.with_name("flwr")), "run", str(app), "--stream"),
            *("--run-config", f"folder='{folder}'", "--federation-config", size),
        )
        wait(out.exists, "Flower's run", limit_s=600)
        return model_of(out)
    finally:
        end_all(f"FLWR_HOME={home}")


_FLARE_CLIENT = """
import sys
from pathlib import Path

import nvflare.client as flare
import torch

import images

torch.set_num_threads(1)
found = images.Data(Path(sys.argv[1]))
model = images.network(found.work["model"])
flare.init()
site = int(flare.get_site_name().partition("-")[2]) - 1
while flare.is_running():
    received = flare.receive()
    weights = {n.partition(".")[2]: torch.as_tensor(a) for n, a in received.params.items()}
    round_ = received.current_round + 1
    after, cases = images.round_at(found, model, weights, site, round_)
    params = {f"net.{n}": t for n, t in after.items()}
    flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": cases}))
"""

_FLARE_START = """
from pathlib import Path

import torch

import images


class Start(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        found = images.Data(Path(folder))
        self.net = images.network(found.work["model"])
        self.net.load_state_dict(found.first)
"""

_FLARE_JOB = """
import sys
from pathlib import Path

import numpy as np
import torch
from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
from nvflare.job_config.script_runner import ScriptRunner

import images
from start import Start

folder = Path(sys.argv[1])
work = images.Data(folder).work
model = Start(str(folder))
model.folder = str(folder)
job = FedAvgJob(model, work["sites"], work["rounds"], "bench", min_clients=work["sites"])
for site in range(work["sites"]):
    job.to(ScriptRunner("client.py", str(folder)), f"site-{site + 1}")
job.simulator_run(str(folder / "flare"), threads=2)
(file,) = (folder / "flare").rglob("FL_global_model.pt")
weights = torch.load(file, weights_only=False)["model"]
arrays = {n.partition(".")[2]: np.asarray(a) for n, a in weights.items()}
np.savez(folder / "flare.npz", **arrays)
"""


def flare(python: Path, folder: Path) -> Weights:
    """FLARE's simulator with two threads, a client process each."""
    import json

    sites: int = json.loads((folder / "work.json").read_text())["sites"]
    if sites > FLARE_MOST:
        raise FederationError(f"not run: more than {FLARE_MOST} sites take a quarter of an hour")
    place = folder / "flare-job"
    for old in (place, folder / "flare"):
        shutil.rmtree(old, ignore_errors=True)
    place.mkdir()
    files: dict[str, Any] = {"client": _FLARE_CLIENT, "start": _FLARE_START, "job": _FLARE_JOB}
    for name, text in files.items():
        (place / f"{name}.py").write_text(text)
    shutil.copyfile(Path(__file__).with_name("images.py"), place / "images.py")
    env = {"PYTHONPATH": str(place), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    Processes(place, env).done("FLARE", str(python), str(place / "job.py"), str(folder))
    return model_of(folder / "flare.npz")
