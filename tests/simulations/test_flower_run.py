"""`flwr run .`: the same study on Flower's own engine gives the same model as medfl-simulate."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from medfl.client.hospital import answer
from medfl.common import tensors
from medfl.common.errors import ConfigError, DataError, FederationError
from medfl.common.messages import Instruction
from medfl.common.study import load_study
from medfl.server.flower import FlowerSites
from medfl.simulations import flower
from medfl.simulations.cli import simulate
from medfl.simulations.hospitals import make_hospitals

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "simulations" / "studies" / "demo_classification.toml"
BUNDLED = {"LICENSE", "pyproject.toml", "simulations/__init__.py", "simulations/flower_app.py"}
# One run takes half a minute on two cores, most of it the start of Flower and Ray.
RUN_S = 200


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's study, two rounds of a few steps."""
    text = DEMO.read_text(encoding="utf-8")
    for written, short in (("rounds = 26", "rounds = 2"), ("local_steps = 18", "local_steps = 3")):
        assert written in text
        text = text.replace(written, short)
    file = tmp_path_factory.mktemp("study") / "two_rounds.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals as files."""
    folder = tmp_path_factory.mktemp("hospitals")
    make_hospitals(folder)
    return folder / "classification"


@pytest.fixture
def config(study: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """A run config as Flower hands it to the apps."""
    return {"study": str(study), "data": str(data), "out": str(tmp_path / "out"), "seed": 5}


def node(config: dict[str, Any], partition: int) -> Context:
    """The context of one node of four, as the simulation makes it."""
    where = {"partition-id": partition, "num-partitions": 4}
    return Context(1, 1000 - partition, where, RecordDict(), config)


def test_the_defaults_in_pyproject_are_settings() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"][
        "app"
    ]
    settings = flower.settings_of(app["config"])
    assert settings.study == DEMO
    assert settings.data is None
    assert settings.out == Path.cwd() / "runs" / "flower-demo_classification"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"study": "no_such_study"}, "demo_segmentation"),
        ({"study": "../studies/demo_classification"}, "there is no file"),
        ({"study": "heart_disease", "data": ""}, "data is empty"),
        ({"seed": "5"}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"out": 3}, "out must be a text"),
    ],
)
def test_a_wrong_setting_is_named(config: dict[str, Any], wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        flower.settings_of(config | wrong)


def test_partition_i_is_the_hospital_number_i_in_order_of_names(config: dict[str, Any]) -> None:
    names = [flower.find_hospital(node(config, i)).name for i in (2, 0, 1)]
    assert names == ["st-marien", "hopital-nord", "riverside"]


def test_a_node_too_many_refuses_because_it_has_no_data(config: dict[str, Any]) -> None:
    surplus = flower.find_hospital(node(config, 3))
    asked = Instruction(kind="prepare", study_digest=surplus.study.digest, run="main")
    assert surplus.name == "no-hospital-4"
    with pytest.raises(DataError):
        answer(surplus, asked)


def test_a_context_from_outside_a_simulation_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="partition-id"):
        flower.find_hospital(Context(1, 1, {}, RecordDict(), config))


def test_too_few_nodes_are_an_error_that_says_what_to_write(config: dict[str, Any]) -> None:
    run = flower.planned(flower.settings_of(config))
    with pytest.raises(FederationError, match="num-supernodes=3"):
        flower.greet(run, 2, made=False)
    flower.greet(run, 3, made=False)
    flower.greet(run, 2, made=True)


class Arriving(FlowerSites):
    """Nodes that register one after another, as on Flower's engine: one more at each look."""

    def __init__(self, most: int) -> None:
        self._seen, self._most = 0, most

    def names(self) -> list[str]:
        self._seen = min(self._seen + 1, self._most)
        return [str(i) for i in range(self._seen)]


def test_nodes_are_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "NODES_SETTLE_S", 0.3)
    assert flower.count_nodes(Arriving(5), enough=3) >= 3
    assert flower.count_nodes(Arriving(2), enough=3) == 2


# Flower 1.41 asks pathspec for a pattern by its old name.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_holds_the_entry_and_nothing_that_lies_about() -> None:
    """The working folder has .venv, runs and caches; Flower refuses more than 10 MB."""
    from flwr.cli.build import build_fab_from_disk

    fab = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))
    assert {n for n in fab.namelist() if not n.startswith(".info/")} == BUNDLED


@dataclass(frozen=True)
class Flwr:
    """Flower's command in a copy of the repository, with a SuperLink that nobody else uses."""

    folder: Path
    env: dict[str, str]

    def __call__(self, *words: str) -> str:
        """Run `flwr` and return what it wrote."""
        done = subprocess.run(
            [Path(sys.executable).with_name("flwr"), *words],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def status(self) -> tuple[str, str]:
        """How the latest run ended, and why."""
        (latest, *_) = json.loads(self("list", "--format", "json"))["runs"]
        return latest["status"], latest["status-details"]


@pytest.fixture(scope="module")
def flwr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flwr]:
    """The command; what `flwr run` leaves running is ended by pid."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'medfl[flower-simulation]'")
    # Flower accepts letters, digits and hyphens in the name of the folder.
    folder = tmp_path_factory.mktemp("copy") / "medfl-copy"
    for name in BUNDLED | {".gitignore"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    home = tmp_path_factory.mktemp("flwr-home")
    http, control = free_ports(2)
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "OMP_NUM_THREADS": "1",
    }
    try:
        yield Flwr(folder, env)
    finally:
        end_all(lambda: processes_with(f"FLWR_HOME={home}"))


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def processes_with(setting: str) -> list[int]:
    """Processes that have this variable in their environment: ours, whoever started them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if setting.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def end_all(find: Callable[[], list[int]]) -> None:
    """End these processes, at last by force."""
    for how, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        for pid in find():
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue
        until = time.monotonic() + wait_s
        while find() and time.monotonic() < until:
            time.sleep(0.1)
    assert find() == []


@pytest.mark.slow
def test_flowers_engine_and_medfl_simulate_give_the_same_bits(
    flwr: Flwr, study: Path, data: Path, tmp_path: Path
) -> None:
    """Three hospitals on four nodes: one node has no data and takes no part."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    simulate(
        load_study(study),
        study,
        data=data,
        out=ours,
        seed=7,
        workers=2,
        compare=[],
        device="cpu",
        cache=tmp_path / "cache",
    )
    wanted = f"study='{study}' data='{data}' out='{theirs}' seed=7"
    size = "num-supernodes=4 client-resources-num-cpus=1"
    said = flwr("run", ".", "--stream", "--run-config", wanted, "--federation-config", size)
    assert flwr.status()[0] == "finished:completed", said
    for name in ("model.safetensors", "model_last.safetensors"):
        a, b = (tensors.load(folder / name) for folder in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[n].view(np.uint8), b[n].view(np.uint8)) for n in a)
    mine, flowers = (json.loads((f / "result.json").read_text()) for f in (ours, theirs))
    for key in ("digests", "cohorts", "selected_round", "sites", "mean", "all", "all_intervals"):
        assert mine[key] == flowers[key], key
    assert list(flowers["refused"]) == ["no-hospital-4"]
    assert (theirs / "report.html").is_file()


@pytest.mark.slow
def test_flwr_run_alone_makes_hospitals_and_trains_on_them(flwr: Flwr) -> None:
    """Nothing is named: Flower's default of two nodes, and the demonstration's own hospitals."""
    said = flwr("run", ".", "--stream")
    assert flwr.status()[0] == "finished:completed", said
    out = flwr.folder / "runs" / "flower-demo_classification"
    result = json.loads((out / "result.json").read_text())
    assert [site["name"] for site in result["sites"]] == ["hopital-nord", "riverside"]
    assert result["all"]["auroc"] > 0.7


@pytest.mark.slow
def test_the_readmes_flwr_run_trains_on_all_made_up_hospitals(flwr: Flwr) -> None:
    """As it stood there, Flower's default of two nodes left one of the three out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("flwr run ."))
    program, *words = shlex.split(line, comments=True)
    assert program == "flwr"
    said = flwr(*words)
    assert flwr.status()[0] == "finished:completed", said
    result = json.loads(
        (flwr.folder / "runs" / "flower-demo_classification" / "result.json").read_text()
    )
    names = [site["name"] for site in result["sites"]]
    assert names == ["hopital-nord", "riverside", "st-marien"]


@pytest.mark.slow
def test_a_run_that_cannot_start_says_why_in_flwr_list(
    flwr: Flwr, study: Path, data: Path, tmp_path: Path
) -> None:
    flwr("run", ".", "--stream", "-c", f"study='{study}' data='{data}' out='{tmp_path / 'out'}'")
    status, why = flwr.status()
    assert status == "finished:failed"
    assert "num-supernodes=3" in why
