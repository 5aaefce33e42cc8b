"""The study files: each loads and builds its network, learns from the real data, and repeats."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfl.client.data.cases import CaseRef
from medfl.common.errors import ConfigError
from medfl.common.models import build_model
from medfl.common.statistics import Shared
from medfl.common.study import Study, load_study
from medfl.simulations.cli import simulate
from medfl.simulations.partition import partition

PublicData = Callable[[str], Path]
Take = Callable[[Path, Path], None]


def every_file(data: Path, copy: Path) -> None:
    """Tables and one .npz are small enough to be used whole."""
    shutil.copytree(data, copy)


def some_pictures(data: Path, copy: Path, *, each: int = 24) -> None:
    """The first `each` pictures of every source; a source with fewer keeps all."""
    with (data / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    taken: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        taken.setdefault(row["source"], []).append(row)
    kept = [row for group in taken.values() for row in group[:each]]
    for folder in ("images", "labels"):
        (copy / folder).mkdir(parents=True)
        for row in kept:
            shutil.copy(data / folder / f"{row['id']}.png", copy / folder)
    with (copy / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)


def some_volumes(data: Path, copy: Path, *, n: int = 30) -> None:
    """The first `n` volumes and their masks."""
    for folder in ("imagesTr", "labelsTr"):
        (copy / folder).mkdir(parents=True)
        for file in sorted((data / folder).glob("*.nii.gz"))[:n]:
            shutil.copy(file, copy / folder)


@dataclass(frozen=True)
class Short:
    """A study cut down to seconds, and what even that must reach on its test part.

    better_than: of `metric`, over all test cases; well above what guessing reaches.
    """

    data: str
    metric: str
    better_than: float
    n_sites: int
    take: Take = every_file
    federation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


HEART = Short("uci_heart_disease", "auroc", 0.7, 4)
# Guessing has an AUC of .5. Calling every pixel a nucleus has a Dice of about .3, calling every
# voxel of the frame hippocampus less than .1.
SHORT = {
    "heart_disease": HEART,
    "heart_disease_dp": HEART,
    "heart_disease_flamby": HEART,
    "pneumonia": Short(
        "pneumoniamnist",
        "auroc",
        0.8,
        5,
        federation={"rounds": 4},
        training={"local_epochs": None, "local_steps": 8},
    ),
    "pneumonia_dp": Short("pneumoniamnist", "auroc", 0.8, 5, federation={"rounds": 4}),
    "hippocampus": Short(
        "msd_hippocampus", "dice", 0.3, 3, take=some_volumes, federation={"rounds": 6}
    ),
    "nuclei": Short(
        "dsb2018_nuclei",
        "dice",
        0.55,
        4,
        take=some_pictures,
        federation={"rounds": 4},
        training={"local_steps": 8},
    ),
}


def study_file(root: Path, name: str) -> Path:
    return root / "simulations" / "studies" / f"{name}.toml"


def run(study: Study, file: Path, data: Path, folder: Path, seed: int = 42) -> dict[str, Any]:
    """result.json of a run without intervals, which take longer than a short training."""
    return simulate(
        replace(study, evaluation=replace(study.evaluation, bootstrap=0)),
        file,
        data=data,
        out=folder / "run",
        seed=seed,
        workers=2,
        compare=[],
        device="cpu",
        cache=folder / "cache",
    )


def test_every_study_file_is_tried_here(root: Path) -> None:
    files = {f.stem for f in (root / "simulations" / "studies").glob("*.toml")}
    assert {name for name in files if not name.startswith("demo_")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_a_study_file_loads_and_its_network_can_be_built(root: Path, name: str) -> None:
    study = load_study(study_file(root, name))
    assert study.name == name
    assert study.title
    assert study.purpose
    shared = Shared(private=study.privacy is not None)
    n_features = None if study.record is None else 13
    model = build_model(study, shared, n_features=n_features, seed=1)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_shortened_study_learns_from_the_real_data(
    root: Path, public_data: PublicData, tmp_path: Path, name: str
) -> None:
    short = SHORT[name]
    short.take(public_data(short.data), tmp_path / "data")
    study = load_study(study_file(root, name))
    study = replace(
        study,
        federation=replace(study.federation, **short.federation),
        training=replace(study.training, **short.training),
    )
    result = run(study, study_file(root, name), tmp_path / "data", tmp_path)
    assert len(result["sites"]) == short.n_sites
    assert result["refused"] == {}
    assert result["all"][short.metric] > short.better_than
    epsilons = [site["epsilon"] for site in result["sites"]]
    if study.privacy is None:
        assert epsilons == [None] * short.n_sites
    else:
        assert all(0 < e <= study.privacy.epsilon for e in epsilons)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean", "together"),
    [("heart_disease_flamby", 0.7025, 0.7520), ("heart_disease", 0.8281, 0.7992)],
)
def test_the_recorded_accuracy_comes_out_again(
    root: Path, public_data: PublicData, tmp_path: Path, name: str, mean: float, together: float
) -> None:
    file = study_file(root, name)
    result = run(load_study(file), file, public_data("uci_heart_disease"), tmp_path)
    # Another CPU may round sums otherwise, which can turn one of 254 test patients over.
    assert result["mean"]["accuracy"] == pytest.approx(mean, abs=0.02)
    assert result["all"]["accuracy"] == pytest.approx(together, abs=0.005)
    assert [site["n_test"] for site in result["sites"]] == [104, 89, 45, 16]


def test_a_source_of_too_few_pictures_is_left_out_of_the_nuclei(root: Path) -> None:
    simulation = load_study(study_file(root, "nuclei")).simulation
    assert simulation is not None
    assert simulation.partition is not None
    sources = {"many": 20, "few": 19}
    cases = [
        CaseRef(f"{source}-{i}", f"{source}-{i}", fields={"source": source})
        for source, n in sources.items()
        for i in range(n)
    ]
    assert {name: len(ids) for name, ids in partition(cases, simulation.partition).items()} == {
        "many": 20
    }
    with pytest.raises(ConfigError, match="drop_below"):
        partition(cases[20:], simulation.partition)


def test_images_of_a_test_part_of_their_own_leave_the_validation_part_to_validate(
    root: Path, tmp_path: Path
) -> None:
    # The public copy has no test part, a full copy of the set has one: the same study serves both.
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for part, n in (("train", 120), ("val", 40), ("test", 60)):
        labels = (np.arange(n) % 2).reshape(n, 1)
        pictures = rng.integers(0, 80, (n, 28, 28)) + 100 * labels[:, :, None]
        arrays |= {f"{part}_images": pictures.astype(np.uint8), f"{part}_labels": labels}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "set.npz", **arrays)
    file = study_file(root, "pneumonia")
    study = load_study(file)
    study = replace(study, federation=replace(study.federation, rounds=1))
    sites = run(study, file, tmp_path / "data", tmp_path)["sites"]
    assert sum(site["n_train"] for site in sites) == 120
    assert sum(site["n_validation"] for site in sites) == 40
    assert sum(site["n_test"] for site in sites) == 60
