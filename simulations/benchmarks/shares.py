"""The benchmark `simulation` as files: a study for medfl, the same shares and orders for others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.candidates import hashed
from medfl.common.seeds import derive
from medfl.common.study import Study, load_study

SEED = 42
RATE, BATCH = 0.01, 32

_STUDY = """
name = "benchmark"
[task]
kind = "classification"
classes = ["normal", "pneumonia"]
[image]
dimensions = 2
size = [28, 28]
fit = "resize"
intensity = "range"
window = [0.0, 255.0]
[model]
name = "{model}"
{options}
[training]
learning_rate = {rate}
batch_size = {batch}
local_epochs = 1
[federation]
rounds = {rounds}
min_sites = {fewest}
{sampled}
[evaluation]
split = "given"
[simulation]
data = {{ format = "medmnist", path = "." }}
partition = {{ kind = "iid", sites = {sites} }}
"""
_OPTIONS = {
    "cnn": "options = { channels = [16, 32, 64], dense = 64 }",
    "densenet121": 'options = { stem = "small" }',
}


@dataclass(frozen=True, slots=True)
class ImageWork:
    """One size. model: cnn or densenet121. most: images used of the collection, None = all.

    sampled: sites asked in each round, None = all; then there is nothing for others to compare.
    """

    model: str
    sites: int
    rounds: int = 3
    most: int | None = None
    sampled: int | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.sites} sites, {self.rounds} rounds"


def made_up(n: int = 400) -> dict[str, NDArray[Any]]:
    """A small collection in MedMNIST's form: half of the pictures have a bright middle."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, n)
    images = rng.integers(0, 120, (n, 28, 28))
    images[labels == 1, 8:20, 8:20] += 100
    images, kept = images.astype(np.uint8), n - n // 10
    return {
        **{"train_images": images[:kept], "train_labels": labels[:kept, None]},
        **{"val_images": images[kept:], "val_labels": labels[kept:, None]},
    }


def write(work: ImageWork, collection: dict[str, NDArray[Any]], folder: Path) -> Study:
    """study.toml and data/images.npz for medfl; work.json, shares.npz and first.npz for others."""
    (folder / "data").mkdir(parents=True)
    if work.most is not None:
        most = {"train": work.most, "val": work.most // 8}
        collection = {n: a[: most[n.partition("_")[0]]] for n, a in collection.items()}
    np.savez(folder / "data" / "images.npz", allow_pickle=False, **collection)
    text = _STUDY.format(
        model=work.model,
        options=_OPTIONS[work.model],
        rate=RATE,
        batch=BATCH,
        rounds=work.rounds,
        sites=work.sites,
        fewest=work.sampled or work.sites,
        sampled=f"sites_per_round = {work.sampled}" if work.sampled else "",
    )
    (folder / "study.toml").write_text(text, encoding="utf-8")
    study = load_study(folder / "study.toml")
    told = {"model": work.model, "rounds": work.rounds, "sites": work.sites}
    (folder / "work.json").write_text(json.dumps({**told, "rate": RATE, "batch": BATCH}))
    np.savez(folder / "shares.npz", allow_pickle=False, **_shares(study, folder))
    np.savez(folder / "first.npz", allow_pickle=False, **_first(study))
    return study


def _first(study: Study) -> dict[str, NDArray[Any]]:
    from medfl.common.models import build_model
    from medfl.common.models.weights import get_weights
    from medfl.common.statistics import Shared

    return get_weights(build_model(study, Shared(), seed=derive(SEED, "weights")))


def _shares(study: Study, folder: Path) -> dict[str, NDArray[Any]]:
    """Positions in train and val images by site and part, in medfl's order, and medfl's seeds."""
    from medfl.simulations.sites import find_hospitals

    positions: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    seeds: list[list[int]] = [[] for _ in range(study.federation.rounds)]
    for hospital in find_hospitals(study, folder / "data", folder / "cache-of-shares"):
        listed = () if hospital.listed is None else hospital.listed.cases
        name = hospital.name
        place = {hashed(name.encode(), "case", ref.case_id): ref.index for ref in listed}
        cases = hospital.cohort(study).cases
        for part, of_sites in positions.items():
            of_sites.append([place[case.key] for case in cases if case.split == part])
        for number, of_round in enumerate(seeds, start=1):
            own = derive(SEED, "site", name, "", "round", number)
            of_round.append(derive(own, "order"))
    shares: dict[str, NDArray[Any]] = {"seeds": np.array(seeds)}
    for part, of_sites in positions.items():
        shares[part] = np.array([i for site in of_sites for i in site], dtype=np.int64)
        shares[f"{part}_ends"] = np.cumsum([len(site) for site in of_sites])
    return shares
