"""Stock Flower as its documentation sets it up: SuperLink, SuperNodes, an app, `flwr run`.

The app is written into a folder of its own and does what `plain` does. It is spared what medfl
does beside: no TLS, no signatures, no checks, and no evaluation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from medfl.common import tensors
from medfl.common.tensors import Array, Tensors
from medfl.simulations.benchmarks.processes import Processes, end_all, free_port, wait

_PROJECT = """
[project]
name = "{name}"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "{package}.server:app"
clientapp = "{package}.client:app"
[tool.flwr.app.config]
{config}
"""

_CONFIG = 'out = ""\nfirst = ""\nrounds = 1\nsites = 2'

_CLIENT = """
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from medfl.simulations.benchmarks.plain import table, trained

app = ClientApp()


@app.train()
def train(message, context):
    weights = {n: a.numpy() for n, a in message.content["arrays"].items()}
    inputs, labels = table(int(context.node_config["site"]))
    after, _ = trained(weights, inputs, labels)
    arrays = ArrayRecord({n: Array(a) for n, a in after.items()})
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""

_SERVER = """
import json, time
from pathlib import Path

from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file, save_file

app = ServerApp()


class Timed(FedAvg):
    seconds = []

    def configure_train(self, *args):
        self.began = time.monotonic()
        return super().configure_train(*args)

    def aggregate_train(self, *args):
        result = super().aggregate_train(*args)
        self.seconds.append(time.monotonic() - self.began)
        return result


@app.main()
def main(grid, context):
    config, sites = context.run_config, context.run_config["sites"]
    first = ArrayRecord({n: Array(a) for n, a in load_file(config["first"]).items()})
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=config["rounds"])
    out = Path(config["out"])
    save_file({n: a.numpy() for n, a in result.arrays.items()}, out / "model.safetensors")
    (out / "seconds.json").write_text(json.dumps(strategy.seconds))
"""


def write_app(app: Path, package: str, config: str, client: str, server: str) -> None:
    """Write a Flower app: config is its `[tool.flwr.app.config]`, the others its two modules."""
    (app / package).mkdir(parents=True)
    project = _PROJECT.format(name=app.name, package=package, config=config)
    (app / "pyproject.toml").write_text(project)
    for name, text in (("__init__", ""), ("client", client), ("server", server)):
        (app / package / f"{name}.py").write_text(text)


class Stock:
    """A SuperLink and its SuperNodes, from `start` to `end`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._app = folder / "stock-bench"
        write_app(self._app, "stock", _CONFIG, _CLIENT, _SERVER)
        home = folder / "flwr-home"
        home.mkdir()
        self._address = f"127.0.0.1:{free_port()}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n'
            f'[superlink.bench]\naddress = "{self._address}"\ninsecure = true\n'
        )
        self._marker = f"FLWR_HOME={home}"
        env = {"FLWR_HOME": str(home), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
        self._processes = Processes(folder, env)

    def start(self, sites: int) -> None:
        """SuperLink and SuperNodes, as their defaults are."""
        port = self._address.rsplit(":", 1)[1]
        # Without installing an app's dependencies, which would time a package index.
        self._processes.start(
            "superlink",
            *(_script("flower-superlink"), "--insecure", "--port", port),
            "--disable-runtime-dependency-installation",
        )
        self._processes.until("superlink", "Uvicorn running")
        for site in range(sites):
            self._processes.start(
                f"supernode-{site}",
                *(_script("flower-supernode"), "--insecure", "--superlink", self._address),
                *("--port", str(free_port()), "--node-config", f"site={site}"),
            )
            self._processes.until(f"supernode-{site}", "SuperNode ID")

    def run(self, first: Tensors, rounds: int, sites: int) -> tuple[dict[str, Array], list[float]]:
        """The final model, and each round's seconds. Raises FederationError."""
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        for old in out.iterdir():
            old.unlink()
        tensors.save(first, out / "first.safetensors")
        config = f"out='{out}' first='{out / 'first.safetensors'}' rounds={rounds} sites={sites}"
        self._processes.done(
            "flwr run", _script("flwr"), "run", str(self._app), "--run-config", config
        )
        told = out / "seconds.json"
        wait(lambda: told.exists() and bool(told.read_text()), "Flower's run", limit_s=1800)
        return tensors.load(out / "model.safetensors"), json.loads(told.read_text())

    def end(self) -> None:
        """All processes, also those that Flower has started."""
        self._processes.end()
        end_all(self._marker)


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
