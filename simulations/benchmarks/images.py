"""The arithmetic of the benchmark `simulation` in plain PyTorch, in two processes: its limit.

    python images.py FOLDER [last|nudged]

trains by the files of FOLDER (`medfl.simulations.benchmarks.shares` writes them) and leaves
model.npz there; with `last` the weights lie channels last in memory, as medfl has them; with
`nudged` the last bit of each first weight is another one, which shows what rounding does. Rivals
get a copy of this file, so that all do the same: medfl is not imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Weights = dict[str, torch.Tensor]
# Images (N, 1, H, W) and labels (N,) of one part of one site.
Part = tuple[torch.Tensor, torch.Tensor]


def network(name: str) -> nn.Module:
    """The small convolutional network, or MONAI's DenseNet121 with group norm; one logit."""
    if name == "cnn":
        layers: list[nn.Module] = []
        for before, filters in ((1, 16), (16, 32), (32, 64)):
            conv = nn.Conv2d(before, filters, 3, padding=1)
            layers += [conv, nn.MaxPool2d(2), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(), nn.Linear(64, 1)]
        return nn.Sequential(*layers, *head)
    from monai.networks.nets.densenet import DenseNet121

    module = DenseNet121(spatial_dims=2, in_channels=1, out_channels=1)
    # A stem for small pictures: 28 x 28 would not be left with a voxel by the usual one.
    module.features.conv0 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    module.features.pool0 = nn.Identity()
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            parent, _, own = path.rpartition(".")
            # The most groups, up to 32, that leave four channels each.
            channels = layer.num_features
            groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
            setattr(module.get_submodule(parent), own, nn.GroupNorm(groups, channels))
    return module


class Data:
    """What lies in the folder."""

    def __init__(self, folder: Path) -> None:
        self.work: dict[str, Any] = json.loads((folder / "work.json").read_text())
        with np.load(folder / "data" / "images.npz") as file:
            images = np.concatenate([file["train_images"], file["val_images"]])
            labels = np.concatenate([file["train_labels"], file["val_labels"]])
        self.images = torch.from_numpy(images[:, None].astype(np.float32) / np.float32(255))
        self.labels = torch.from_numpy(labels.reshape(-1, 1).astype(np.float32))
        with np.load(folder / "shares.npz") as file:
            self._shares = {name: file[name] for name in file.files}
        with np.load(folder / "first.npz") as file:
            self.first: Weights = {name: torch.from_numpy(file[name]) for name in file.files}

    def part(self, site: int, name: str) -> Part:
        """One part of one site."""
        ends = self._shares[f"{name}_ends"]
        start = int(ends[site - 1]) if site else 0
        positions = torch.from_numpy(self._shares[name][start : int(ends[site])])
        return self.images[positions], self.labels[positions]

    def seed(self, round_: int, site: int) -> int:
        """Of the order of a site's cases in one round (from 1)."""
        return int(self._shares["seeds"][round_ - 1, site])


def evaluate(model: nn.Module, part: Part, batch: int) -> int:
    """How many cases of the part are told right."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(part[1]), batch):
            images, labels = (t[start : start + batch] for t in part)
            right += int(((model(images) > 0) == (labels > 0.5)).sum())
    return right


def train(model: nn.Module, part: Part, seed: int, rate: float, batch: int) -> None:
    """One epoch of gradient descent."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    loss_of = nn.BCEWithLogitsLoss()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(part[1])))
    for start in range(0, len(order), batch):
        images, labels = (t[order[start : start + batch]] for t in part)
        optimiser.zero_grad()
        loss_of(model(images), labels).backward()
        optimiser.step()


def round_at(
    data: Data, model: nn.Module, weights: Weights, site: int, round_: int
) -> tuple[Weights, int]:
    """One site's round: evaluate what was received, train; the weights after it, and its cases."""
    work = data.work
    model.load_state_dict(weights)
    evaluate(model, data.part(site, "validation"), work["batch"])
    part = data.part(site, "train")
    train(model, part, data.seed(round_, site), work["rate"], work["batch"])
    return model.state_dict(), len(part[1])


def last_at(data: Data, model: nn.Module, weights: Weights, site: int) -> int:
    """The final evaluation at one site; how many cases were told right."""
    model.load_state_dict(weights)
    parts = (data.part(site, name) for name in ("validation", "test"))
    return sum(evaluate(model, part, data.work["batch"]) for part in parts)


def summed(
    data: Data, model: nn.Module, weights: Weights, sites: Iterable[int], round_: int
) -> tuple[Weights, int]:
    """Sum of the sites' weights, each times its cases, and the cases of all."""
    total, cases = (
        {name: torch.zeros_like(t, dtype=torch.float64) for name, t in weights.items()},
        0,
    )
    for site in sites:
        own, n = round_at(data, model, weights, site, round_)
        for name, tensor in own.items():
            total[name] += n * tensor.double()
        cases += n
    return total, cases


def run(folder: Path, how: str = "") -> None:
    """This process takes every other site, a forked one the rest."""
    torch.set_num_threads(1)
    data = Data(folder)
    model, sites = network(data.work["model"]), range(data.work["sites"])
    if how == "last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours, theirs = Pipe()
    child = os.fork()
    if not child:
        _other(theirs, data, model, sites[1::2])
    weights = data.first
    if how == "nudged":
        weights = {n: torch.nextafter(t, torch.full_like(t, 9)) for n, t in weights.items()}
    for round_ in range(1, data.work["rounds"] + 1):
        ours.send((_arrays(weights), round_))
        total, cases = summed(data, model, weights, sites[::2], round_)
        their_total, their_cases = ours.recv()
        weights = {
            name: ((t + torch.from_numpy(their_total[name])) / (cases + their_cases)).float()
            for name, t in total.items()
        }
    ours.send((_arrays(weights), 0))
    right = sum(last_at(data, model, weights, site) for site in sites[::2]) + ours.recv()
    os.waitpid(child, 0)
    np.savez(folder / "model.npz", allow_pickle=False, **_arrays(weights))
    print(json.dumps({"right": right}))


def _other(pipe: Any, data: Data, model: nn.Module, sites: Sequence[int]) -> None:
    while True:
        arrays, round_ = pipe.recv()
        weights = {name: torch.from_numpy(a) for name, a in arrays.items()}
        if not round_:
            pipe.send(sum(last_at(data, model, weights, site) for site in sites))
            os._exit(0)
        total, cases = summed(data, model, weights, sites, round_)
        pipe.send((_arrays(total), cases))


def _arrays(weights: Weights) -> dict[str, np.ndarray[Any, Any]]:
    return {name: t.numpy() for name, t in weights.items()}


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
