"""Whole runs with real workers: the same bits again, sound results, and sites that fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client import flower
from medfl.client.hospital import Hospital, answer
from medfl.common import tensors
from medfl.common.errors import ConfigError, FederationError
from medfl.common.messages import Instruction, Reply
from medfl.common.metrics import summarise
from medfl.common.metrics.scores import concatenate, load
from medfl.common.study import Study, load_study
from medfl.server.rounds import Outcome
from medfl.simulations.results import write_results
from medfl.simulations.run import Machine, as_pooled, choose_device, plan_runs, preload, run_all
from medfl.simulations.sites import SimulatedRun, find_hospitals

Write = Callable[..., Path]


def ran(
    study: Study,
    data: Path,
    out: Path,
    compare: Sequence[str] = (),
    seed: int = 1,
    workers: int = 2,
) -> tuple[dict[str, Any], dict[str, Outcome], list[SimulatedRun]]:
    """A run's result, outcomes and plan."""
    runs = plan_runs(study, find_hospitals(study, data, data.parent / "cache"), out, compare, "cpu")
    outcomes = run_all(runs, seed=seed, machine=Machine(workers))
    result = write_results(runs, outcomes, seed=seed, seconds=1.0, environment={})
    return result, outcomes, runs


@pytest.fixture
def data(write_hospital: Write) -> Path:
    """Hospitals a, b, c with 20, 14 and 7 training records."""
    write_hospital("a", n=30)
    write_hospital("b", n=21)
    return write_hospital("c", n=10)


def lasting(folder: Path) -> dict[str, bytes]:
    """Everything of a run's folder that has to be the same again."""
    files = {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.suffix in (".safetensors", ".json")
    }
    result = json.loads(files["result.json"])
    for varies in ("date", "seconds"):
        result.pop(varies)
    return {**files, "result.json": json.dumps(result).encode()}


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bits(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    study = load_study(write_study())
    compare = ["scaffold", "pooled"]
    found = []
    for workers in (1, 2, 3):
        ran(study, data, tmp_path / f"w{workers}", compare, workers=workers)
        found.append(lasting(tmp_path / f"w{workers}"))
    assert "baselines/scaffold/model.safetensors" in found[0]
    assert found[0] == found[1] == found[2]
    ran(study, data, tmp_path / "other", seed=2)
    other = lasting(tmp_path / "other")
    assert other["model.safetensors"] != found[0]["model.safetensors"]


def test_a_comparison_does_not_change_the_main_run(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    study = load_study(write_study())
    ran(study, data, tmp_path / "alone")
    ran(study, data, tmp_path / "compared", ["fedprox", "local"])
    alone, compared = (tmp_path / n / "model.safetensors" for n in ("alone", "compared"))
    assert alone.read_bytes() == compared.read_bytes()


@pytest.mark.parametrize("more", ["local_steps = 4", "local_epochs = 2"])
def test_pooled_equals_the_federation_of_one_site(
    write_study: Write, write_hospital: Write, tmp_path: Path, more: str
) -> None:
    data = write_hospital("only", n=30)
    # Whole batches: another order of the same records sums up to the same, but for the last bits.
    path = write_study(batch_size=100)
    path.write_text(path.read_text().replace("local_steps = 3", more))
    result, outcomes, _ = ran(load_study(path), data, tmp_path / "out", ["pooled", "local"])
    for name in ("1.weight", "1.bias"):
        main, pooled = (outcomes[run].weights[name] for run in ("main", "pooled"))
        assert main == pytest.approx(pooled, rel=1e-5)
        assert np.any(main != 0)
    assert result["all"]["auroc"] == pytest.approx(result["baselines"]["pooled"]["all"]["auroc"])
    assert result["all"]["brier"] == pytest.approx(result["baselines"]["local"]["all"]["brier"])


def test_pooled_takes_as_many_steps_as_all_hospitals_together(write_study: Write) -> None:
    study = load_study(write_study(local_steps=3, strategy="fedprox", min_sites=3))
    pooled = as_pooled(study, 4)
    assert pooled.training.local_steps == 12
    assert (pooled.federation.strategy, pooled.federation.min_sites) == ("fedavg", 1)


KEYS = {"study", "strategy", "seed", "rounds", "seconds", "sites", "mean", "all", "baselines"}
SITE_KEYS = {"name", "n_train", "n_test", "metrics", "epsilon"}
METRICS = set(
    "accuracy balanced_accuracy auroc recall specificity precision f1 brier ece dice hd95".split()
)


def test_the_result_holds_what_is_promised(write_study: Write, data: Path, tmp_path: Path) -> None:
    study = load_study(write_study())
    result, outcomes, _ = ran(study, data, tmp_path / "out", ["local", "pooled"])
    written = (tmp_path / "out" / "result.json").read_text()
    assert json.loads(json.dumps(result)) == json.loads(written)
    assert KEYS <= result.keys()
    assert (result["study"], result["strategy"], result["seed"]) == ("risk", "fedavg", 1)
    assert (result["rounds"], result["seconds"]) == (3, 1.0)
    assert set(result["baselines"]) == {"local", "pooled"}
    for part in (result, *result["baselines"].values()):
        assert [(s["name"], s["n_train"], s["n_test"]) for s in part["sites"]] == [
            ("a", 20, 10),
            ("b", 14, 7),
            ("c", 7, 3),
        ]
        assert all(SITE_KEYS <= s.keys() and s["epsilon"] is None for s in part["sites"])
        assert set(part["all"]) >= METRICS - {"dice", "hd95"}
        for name, value in part["mean"].items():
            values = [s["metrics"][name] for s in part["sites"] if s["metrics"][name] is not None]
            assert value == pytest.approx(np.mean(values))
    tables = [load(tmp_path / "out" / "sites" / n / "scores.npz") for n in "abc"]
    expected = summarise(study.task, concatenate(tables), result["all"])
    assert result["all"] == expected
    assert result["digests"]["model"] == tensors.digest(outcomes["main"].weights)
    saved = tensors.load(tmp_path / "out" / "model.safetensors")
    assert tensors.digest(saved) == result["digests"]["model"]


def test_pooled_cases_go_back_to_their_hospitals(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    study = load_study(write_study())
    result, _, _ = ran(study, data, tmp_path / "out", ["pooled"])
    pooled = load(tmp_path / "out/baselines/pooled/sites/pooled/scores.npz")
    own = load(tmp_path / "out/sites/b/scores.npz")
    rows = [pooled.keys.index(key) for key in own.keys]
    assert np.array_equal(pooled.columns["target"][rows], own.columns["target"])
    p, y = pooled.columns["probability"][rows, 0], own.columns["target"]
    site = result["baselines"]["pooled"]["sites"][1]
    assert site["metrics"]["brier"] == pytest.approx(np.mean((p - y) ** 2))


def test_every_round_of_every_run_is_logged(write_study: Write, data: Path, tmp_path: Path) -> None:
    ran(load_study(write_study()), data, tmp_path / "out", ["local"])
    lines = [json.loads(t) for t in (tmp_path / "out/rounds.jsonl").read_text().splitlines()]
    assert sorted((x["run"], x["round"]) for x in lines) == [
        # The fourth is the judgement of the last model, which no round received.
        (run, r)
        for run in ("local", "main")
        for r in (1, 2, 3, 4)
    ]
    assert {s["name"] for s in lines[0]["sites"]} == {"a", "b", "c"}


def test_hospitals_without_test_cases_have_no_metrics(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    write_hospital("a", n=12)
    data = write_hospital("b", n=9, test=False)
    study = load_study(write_study())
    result, _, _ = ran(study, data, tmp_path / "out", ["pooled"])
    b = result["sites"][1]
    assert (b["name"], b["n_train"], b["n_test"], b["metrics"]["auroc"]) == ("b", 9, 0, None)
    assert result["mean"] == result["sites"][0]["metrics"]
    assert [s["name"] for s in result["baselines"]["pooled"]["sites"]] == ["a"]


def test_a_study_without_test_cases_still_gives_a_model(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    data = write_hospital("a", test=False)
    result, _, _ = ran(load_study(write_study()), data, tmp_path / "out", ["pooled"])
    assert set(result["all"].values()) == {None}
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_was_left_out_is_in_the_result(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    rows = "".join(f"p{i},{i / 10},{-i / 10},{'yes' if i % 2 else 'no'},train\n" for i in range(20))
    data = write_hospital("a", text=f"patient,x,y,label,split\n{rows}q,1,1,,train\n")
    result, _, _ = ran(load_study(write_study()), data, tmp_path / "out")
    assert result["sites"][0]["quarantined"] == {"label_missing": 1}


def test_under_privacy_every_site_tells_its_epsilon_and_no_loss(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    write_hospital("free")
    data = write_hospital("strict", more="[privacy]\nepsilon = 0.5\ndelta = 1e-3")
    study = load_study(write_study(scale="range", more="[privacy]\nepsilon = 3.0\ndelta = 1e-3\n"))
    result, outcomes, _ = ran(study, data, tmp_path / "out", ["pooled"])
    spent = {s["name"]: s["epsilon"] for s in result["sites"]}
    assert 2.95 < spent["free"] <= 3.0
    assert 0.49 < spent["strict"] <= 0.5
    assert all(s["epsilon"] is None for s in result["baselines"]["pooled"]["sites"])
    for site in ("free", "strict"):
        told = [s for r in outcomes["main"].records for s in r.sites if s["name"] == site]
        assert [s["loss"] for s in told] == [None] * 3
        epsilons = [s["epsilon"] for s in told]
        assert epsilons == sorted(epsilons)
        assert epsilons[-1] == spent[site]


def spoilt(when: Callable[[Hospital, Instruction], bool], how: Callable[[], None]) -> Any:
    """`answer` that does `how` first where `when` says so; the workers inherit it."""

    def spoilt_answer(hospital: Hospital, asked: Instruction) -> Reply:
        if when(hospital, asked):
            how()
        return answer(hospital, asked)

    return spoilt_answer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_costs_one_site_one_round(
    write_study: Write, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "answer", spoilt(lambda h, a: h.name == "b" and a.round == 2, die))
    _, outcomes, _ = ran(load_study(write_study()), data, tmp_path / "out")
    records = outcomes["main"].records
    assert [r.left_out for r in records] == [{}, {"b": "node failed"}, {}]
    assert {r.site for r in outcomes["main"].final} == {"a", "b", "c"}


def test_a_hospital_whose_data_kill_the_worker_takes_no_part(
    write_study: Write, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "answer", spoilt(lambda h, a: h.name == "b", die))
    result, outcomes, _ = ran(load_study(write_study()), data, tmp_path / "out")
    assert outcomes["main"].refused == {"2": "node failed"}
    assert [s["name"] for s in result["sites"]] == ["a", "c"]
    assert result["refused"] == {"2": "node failed"}


def test_a_hospital_without_usable_data_takes_no_part(
    write_study: Write, data: Path, write_hospital: Write, tmp_path: Path
) -> None:
    write_hospital("worst", text="patient,x,y,label,split\nJane Doe,1,2,maybe,train\n")
    result, _, _ = ran(load_study(write_study()), data, tmp_path / "out", ["pooled"])
    assert result["refused"] == {"worst": "data cannot serve the study"}
    assert [s["name"] for s in result["baselines"]["pooled"]["sites"]] == ["a", "b", "c"]
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"Jane" not in everything


def test_an_error_in_a_comparison_ends_the_run_with_its_reason(
    write_study: Write, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        flower, "answer", spoilt(lambda h, a: a.run == "local" and a.kind == "prepare", die)
    )
    with pytest.raises(FederationError, match="0 of 3 sites can take part"):
        ran(load_study(write_study()), data, tmp_path / "out", ["local"])


@pytest.fixture
def image_study(tmp_path: Path, risk_study: Any) -> Study:
    """A network with batch norm, two sites; its pictures lie in tmp_path / data."""
    from medfl.common.source import DataSource
    from medfl.common.study import Evaluation, ImageInput, Model, Partition, Simulation

    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 48), ("val", 12), ("test", 24)):
        labels = np.arange(n) % 2
        images = rng.integers(0, 100, (n, 8, 8)) + 120 * labels[:, None, None]
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels[:, None]}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "tiny.npz", **arrays)
    base = risk_study(training={"learning_rate": 0.1, "batch_size": 8})
    return replace(
        base,
        task=replace(base.task, kind="classification", label_map={"0": "no", "1": "yes"}),
        record=None,
        image=ImageInput(dimensions=2, size=[8, 8], intensity="federated"),
        model=Model(name="cnn", options={"channels": [4], "dense": 0, "norm": "batch"}),
        federation=replace(base.federation, strategy="fedbn", rounds=4),
        evaluation=Evaluation(split="given", bootstrap=0),
        simulation=Simulation(
            data=DataSource(format="medmnist", path=Path("tiny.npz")),
            partition=Partition(kind="iid", sites=2),
        ),
    )


def test_fedbn_on_images_over_workers(tmp_path: Path, image_study: Study) -> None:
    """Another kind of data, a network with buffers, and layers that stay at home."""
    result, _, _ = ran(image_study, tmp_path / "data", tmp_path / "out", ["fedavg"])
    assert result["all"]["auroc"] > 0.9
    assert result["baselines"]["fedavg"]["all"]["auroc"] > 0.9
    states = [tmp_path / "out/sites" / f"site-{i}" / "state" for i in (1, 2)]
    layers = [tensors.load(s / "home_00004.safetensors") for s in states]
    assert not np.array_equal(layers[0]["1.running_mean"], layers[1]["1.running_mean"])
    assert (tmp_path / "out/sites/site-1/examples.npz").exists()


def test_each_site_keeps_the_whole_model_that_reached_its_figures(
    tmp_path: Path, image_study: Study
) -> None:
    """The published file says that it is the shared part; a site's own file gives its scores."""
    from medfl.client.encoding import case_set
    from medfl.client.evaluate import score
    from medfl.common.models import build_model
    from medfl.common.models.weights import set_weights

    _, outcomes, runs = ran(image_study, tmp_path / "data", tmp_path / "out")
    published = tmp_path / "out/model.safetensors"
    assert tensors.metadata(published)["holds"].startswith("the shared part alone")
    file = tmp_path / "out/sites/site-1/model.safetensors"
    assert file.stat().st_mode & 0o777 == 0o600
    model = build_model(image_study, outcomes["main"].shared, seed=1)
    set_weights(model, tensors.load(file))
    cohort = runs[0].hospital(1).cohort
    cases = case_set(image_study, outcomes["main"].shared, cohort, "test")
    again = score(model, cases, image_study, "cpu", distances=False)
    kept = load(tmp_path / "out/sites/site-1/scores.npz")
    assert again.columns["probability"] == pytest.approx(kept.columns["probability"], abs=1e-6)


def test_models_trained_alone_are_tried_on_the_other_hospitals(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    """Nothing common was trained, so there is no common file; b's model is tried on a's cases."""
    result, _, _ = ran(load_study(write_study()), data, tmp_path / "out", ["local"])
    local = tmp_path / "out/baselines/local"
    assert not (local / "model.safetensors").exists()
    tested = result["baselines"]["local"]["elsewhere"]
    assert {whose: set(where) for whose, where in tested.items()} == {
        whose: {"a", "b", "c"} for whose in "abc"
    }
    for place, name in enumerate("abc"):
        own = result["baselines"]["local"]["sites"][place]["metrics"]["brier"]
        assert tested[name][name]["brier"] == pytest.approx(own, abs=1e-6)
    weights = tensors.load(local / "sites/b/model.safetensors")
    assert not np.array_equal(
        weights["1.weight"], tensors.load(local / "sites/a/model.safetensors")["1.weight"]
    )
    assert tested["b"]["a"]["brier"] != tested["a"]["a"]["brier"]


def test_a_mean_of_models_with_batch_norm_is_refused(tmp_path: Path, image_study: Study) -> None:
    federation = replace(image_study.federation, strategy="fedavg", keep="average")
    study = replace(image_study, federation=federation)
    with pytest.raises(ConfigError, match=r"federation\.keep: the model has batch norm"):
        ran(study, tmp_path / "data", tmp_path / "out", [])


def test_a_mean_is_compared_with_what_has_none(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    study = load_study(write_study(federation='keep = "average"'))
    sites = find_hospitals(study, data, tmp_path)
    runs = plan_runs(study, sites, tmp_path / "out", ["local", "pooled", "fedadam"], "cpu")
    kept = {run.name: run.study.federation.keep for run in runs}
    assert kept == {"main": "average", "local": "last", "pooled": "average", "fedadam": "average"}


def test_alone_and_without_privacy_nobody_trains_under_noise(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    privacy = "[privacy]\nepsilon = 3.0\ndelta = 1e-3\n"
    data, study = write_hospital("a", more=privacy), write_study(scale="range", more=privacy)
    compare = ["local", "no_privacy"]
    result, outcomes, _ = ran(load_study(study), data, tmp_path / "out", compare)
    assert result["sites"][0]["epsilon"] is not None
    for name in compare:
        assert result["baselines"][name]["sites"][0]["epsilon"] is None
    # It is the study in which nobody asks for privacy, to the last bit.
    site = data / "a" / "site.toml"
    site.write_text(site.read_text().replace(privacy, ""))
    plain, _, _ = ran(load_study(write_study(scale="range")), data, tmp_path / "plain")
    assert plain["digests"]["model"] == tensors.digest(outcomes["no_privacy"].weights)


def test_comparisons_are_planned_once_each(write_study: Write, data: Path, tmp_path: Path) -> None:
    study = load_study(write_study())
    sites = find_hospitals(study, data, tmp_path)
    runs = plan_runs(study, sites, tmp_path / "out", ["local", "pooled", "local"], "cpu")
    assert [r.name for r in runs] == ["main", "local", "pooled"]
    assert [r.folder.name for r in runs] == ["out", "local", "pooled"]
    with pytest.raises(ConfigError, match="--compare fedfoo: is not known"):
        plan_runs(study, sites, tmp_path, ["fedfoo"], "cpu")


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="must be one of"):
        choose_device("gpu")


PRELOADED = """
import sys
from pathlib import Path
from medfl.common.study import load_study
from medfl.simulations.run import Machine, plan_runs, preload
from medfl.simulations.sites import find_hospitals
from medfl.client.hospital import answer
from medfl.server.rounds import run_study

study = load_study(Path(sys.argv[1]))
run = plan_runs(study, find_hospitals(study, Path(sys.argv[2]), Path("c")), Path("o"), [], "cpu")[0]
hospitals = {n: run.hospital(i) for i, n in enumerate(run.names, start=1)}
preload(study)
before = set(sys.modules)

class Here:
    def names(self):
        return list(run.names)

    def ask(self, instructions):
        return (answer(hospitals[a], asked) for a, asked in instructions)

run_study(study, Here(), seed=1)
print(len({n.partition(".")[0] for n in set(sys.modules) - before} & {"torch", "sklearn", "scipy"}))
print(sum(n.startswith(("torch", "sklearn", "scipy")) for n in set(sys.modules) - before))
"""


@pytest.mark.slow
def test_workers_import_nothing_heavy_after_the_fork(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    import subprocess
    import sys

    assert callable(preload)
    path = write_study()
    path.write_text(path.read_text().replace('split = "given"', 'split = "shuffled"'))
    done = subprocess.run(
        [sys.executable, "-c", PRELOADED, str(path), str(data)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert int(done.stdout.split()[1]) < 20, done.stdout
