"""The whole of it, as hospitals have it: separate processes, DICOM, TLS, consent, audit, budget."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medfl.client.ledger import Ledger
from medfl.common import tensors
from medfl.common.errors import Interrupted, StorageError
from medfl.common.site import load_site
from medfl.common.study import load_study
from medfl.server import runs, studies
from medfl.server.federation import Federation
from medfl.server.report import federated
from medfl.server.settings import open_federation
from medfl.simulations.demo_federation import World, agree, perform, staged
from medfl.simulations.run import Machine, plan_runs, run_all
from medfl.simulations.sites import find_hospitals


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hospitals_train_as_the_simulator_does_and_keep_their_secrets(
    tmp_path: Path,
) -> None:
    """First with one hospital under differential privacy, which is the demonstration; then none."""
    told = io.StringIO()
    with staged(tmp_path / "world", Console(file=told, width=200), small=True) as world:
        private = perform(world, seed=42)
        federation = open_federation(world.coordinator.folder / "fed")
        assert_private(federation, world, private)
        assert_nothing_leaked(world)
        assert_report(federation, private, world.coordinator.folder)
        open_ = run_without_privacy(world)
        expected = simulated(world, tmp_path)
        got = tensors.load(runs.model_of(federation, open_))
        assert tensors.digest(got) == tensors.digest(expected)
    assert all(p.poll() is not None for p in world.stage.processes)
    starts = [p for p in world.stage.processes if p.args[-1] == "start"]
    assert [p.returncode for p in starts] == [0] * 4


@pytest.mark.slow
def test_a_demonstration_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    started = []

    def stopped() -> None:
        with staged(tmp_path, Console(file=io.StringIO()), small=True) as world:
            world.coordinator.does("medfl-server init fed --name Demo --listen 127.0.0.1:0")
            world.coordinator.keeps("medfl-server start", until="listening on")
            started.extend(p for p in world.stage.processes if p.poll() is None)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        stopped()
    assert [p.returncode for p in started] == [0]


def assert_private(federation: Federation, world: World, run: str) -> None:
    """One hospital spent epsilon, which stands in its own ledger; it told no count or metric."""
    site = load_site(world.hospitals[1].folder / "site.toml")
    assert site.privacy is not None
    result = json.loads((runs.folder_of(federation, run) / "result.json").read_text())
    by_name = {s["name"]: s for s in result["sites"]}
    epsilons = {name: s["epsilon"] for name, s in by_name.items()}
    assert 7.5 < epsilons.pop("riverside") <= site.privacy.epsilon
    assert set(epsilons.values()) == {None}
    entries = Ledger(site.ledger).entries()
    assert [(e.charge.run, e.charge.round, e.settled) for e in entries] == [
        (run, 1, True),
        (run, 2, True),
    ]
    silent = by_name["riverside"]
    assert (silent["n_train"], silent["n_test"], silent["metrics"]) == (None, None, {})
    for line in runs.progress(federation, run):
        (own,) = [s for s in line.sites if s["name"] == "riverside"]
        assert own["loss"] is None
        assert own["metrics"] == {}
    (decision,) = [
        studies.decision_of(federation, p.digest, "riverside")
        for p in studies.published(federation)
    ]
    assert decision is not None
    assert decision.cases == site.privacy.declared_patients


def assert_nothing_leaked(world: World) -> None:
    """No patient's number and no file name of a hospital is in any file of the coordinator."""
    secret = set()
    for hospital in world.hospitals:
        images = hospital.folder / "images"
        secret |= {p.name for p in images.rglob("*") if len(p.name) > 5}
        secret |= set(re.findall(r"MRN\d{6}|NIP-\d{5}|\b00\d{5}\b", text_of(hospital.folder)))
    assert len(secret) > 50
    looked = 0
    for file in world.coordinator.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            looked += 1
            assert not [s for s in secret if s.encode() in content], file
    assert looked > 20


def text_of(folder: Path) -> str:
    tables = [*folder.glob("*.csv"), *folder.glob("*.tsv")]
    return "\n".join(table.read_text() for table in tables)


def assert_report(federation: Federation, run: str, copies: Path) -> None:
    """The report is there, signed together with the model, and a changed one is refused."""
    signed = federated.opened(federation, run)
    assert signed.model == runs.load(federation, run).model
    assert runs.sha256(copies / "report.html") == signed.report
    assert signed.report in federation.audit.path.read_text()
    page = (copies / "report.html").read_text()
    assert "riverside" in page
    assert "to them" in page  # bytes a round
    file = runs.folder_of(federation, run) / "report.html"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"riverside", b"riverslde"))
    with pytest.raises(StorageError, match=r"report\.html is not what the run wrote"):
        federated.opened(federation, run)
    file.write_bytes(whole)


def run_without_privacy(world: World) -> str:
    """The same hospitals, none of which insists on privacy, and another study."""
    site = world.hospitals[1].folder / "site.toml"
    site.write_text(site.read_text().split("# This hospital trains under")[0])
    study = world.coordinator.folder / "study.toml"
    study.write_text(study.read_text().replace('name = "demo-federation"', 'name = "open"'))
    world.coordinator.does("medfl-server study publish study.toml")
    for hospital in world.hospitals:
        hospital.does("medfl-client studies")
    agree(world, "open")
    (line,) = world.coordinator.does("medfl-server run open --seed 7 --json")
    done = json.loads(line)
    assert (done["state"], done["sites"]) == ("done", ["hopital-nord", "riverside", "st-marien"])
    return str(done["id"])


def simulated(world: World, folder: Path) -> Any:
    study = load_study(world.coordinator.folder / "study.toml")
    hospitals = find_hospitals(study, world.coordinator.folder.parent, folder / "cache")
    (main,) = plan_runs(study, hospitals, folder / "simulated", [], "cpu")
    return run_all([main], seed=7, machine=Machine(workers=1))["main"].weights
