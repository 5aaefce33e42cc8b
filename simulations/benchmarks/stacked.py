"""Small sites trained one after another, as a simulation does it, and all of them at once.

At once: the parameters of all sites lie behind each other, and `torch.func.vmap` takes the same
steps with them. On a GPU, if there is one, else on one core of the CPU, as a worker. It answers
whether stacking sites would pay on this machine; a simulation does not do it.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from medfl.client.training.batches import shuffled_batches
from medfl.client.training.caseset import CaseSet
from medfl.client.training.loop import train
from medfl.client.training.optimisers import make_optimiser
from medfl.client.training.plan import TrainPlan
from medfl.common.losses import build_loss
from medfl.common.models import build_model
from medfl.common.models.weights import get_weights, place, set_weights
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study, load_study
from medfl.simulations.benchmarks.plain import Weights, apart
from medfl.simulations.benchmarks.rows import Row, Spread

# Of the largest number of an array plus a hundredth.
TOLERANCE, SMALL = 1e-4, 1e-2
_FEATURES = 13

_STUDY = """
name = "stacked"
[task]
kind = "classification"
classes = ["no", "yes"]
[training]
learning_rate = 0.01
batch_size = {batch}
local_steps = {steps}
[federation]
rounds = 1
"""
_IMAGE = """
[image]
dimensions = 2
size = [28, 28]
fit = "resize"
intensity = "range"
window = [0.0, 1.0]
[model]
name = "cnn"
options = {{ channels = [16, 32, 64], dense = 64 }}
"""
_RECORD = """
[record]
features = [{features}]
[model]
name = "mlp"
"""


@dataclass(frozen=True, slots=True)
class StackWork:
    """So many sites with a few full batches each."""

    model: str
    sites: int
    batch: int
    steps: int = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one case's input."""
        return (1, 28, 28) if self.model == "cnn" else (_FEATURES,)

    @property
    def study(self) -> Study:
        """The same for all sites."""
        features = ", ".join(f'{{ name = "x{i}" }}' for i in range(_FEATURES))
        more = _IMAGE.format() if self.model == "cnn" else _RECORD.format(features=features)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "study.toml"
            file.write_text(_STUDY.format(batch=self.batch, steps=self.steps) + more)
            return load_study(file)

    def __str__(self) -> str:
        return f"{self.model}, {self.sites} sites, {self.steps} steps of {self.batch} cases: a site"


def rows(small: bool) -> list[Row]:
    """A row a work: milliseconds of training a site."""
    if small:
        return [_row(StackWork("mlp", 3, 4), 1), _row(StackWork("cnn", 2, 4), 1)]
    works = [StackWork("mlp", n, 16) for n in (4, 16, 64)]
    works += [StackWork("cnn", n, b) for b in (4, 16) for n in (4, 16, 64)]
    return [_row(work, 7) for work in works]


def _row(work: StackWork, repeats: int) -> Row:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = _Given.of(work, device)
        ways: dict[str, Callable[[], list[Weights]]] = {
            "one by one": given.one_by_one,
            "stacked": given.stacked,
        }
        found = {way: run() for way, run in ways.items()}  # and warm
        ms: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                started = time.perf_counter()
                run()  # ends with the weights on the CPU, so nothing is under way
                ms[way].append(1e3 * (time.perf_counter() - started) / work.sites)
    finally:
        torch.set_num_threads(threads)
    pairs = zip(ms["one by one"], ms["stacked"], strict=True)
    distance = max(
        apart(one, other, SMALL)
        for one, other in zip(found["stacked"], found["one by one"], strict=True)
    )
    return Row(
        work=str(work),
        medfl=Spread.of(ms["one by one"]),
        rivals={"stacked": Spread.of(ms["stacked"])},
        unit="ms",
        agree=distance <= TOLERANCE,
        notes={
            "device": device,
            "apart": distance,
            "stacking_gains": median(one / other for one, other in pairs),
        },
    )


@dataclass(frozen=True, slots=True)
class _Given:
    study: Study
    model: nn.Module
    start: Weights
    cases: Sequence[CaseSet]
    device: str

    @classmethod
    def of(cls, work: StackWork, device: str) -> _Given:
        study, rng = work.study, np.random.default_rng(3)
        features = None if work.model == "cnn" else _FEATURES
        model = build_model(study, Shared(), n_features=features, seed=1)
        n = 2 * work.batch
        names = tuple(map(str, range(n)))
        cases = [
            CaseSet(
                rng.normal(size=(n, *work.shape)).astype(np.float32),
                rng.integers(0, 2, n),
                names,
                names,
            )
            for _ in range(work.sites)
        ]
        return cls(study, place(model, device), get_weights(model), cases, device)

    def one_by_one(self) -> list[Weights]:
        ended = []
        for site, cases in enumerate(self.cases):
            set_weights(self.model, self.start)
            plan = TrainPlan(round=1, rounds=1, seed=site, device=self.device)
            train(self.model, cases, self.study, Shared(), plan)
            ended.append(get_weights(self.model))
        return ended

    def stacked(self) -> list[Weights]:
        training, sites = self.study.training, len(self.cases)
        bare, loss_of = copy.deepcopy(self.model).to("meta"), build_loss(self.study, Shared())
        parameters = {
            name: nn.Parameter(torch.from_numpy(a).to(self.device).repeat(sites, *[1] * a.ndim))
            for name, a in self.start.items()
        }

        def loss(own: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return loss_of(functional_call(bare, dict(own), (inputs,)), targets)

        optimiser = make_optimiser(training, list(parameters.values()))
        orders = [
            shuffled_batches(len(c), training.batch_size, derive(site, "order"))
            for site, c in enumerate(self.cases)
        ]
        for _ in range(training.local_steps or 1):
            positions = [next(order) for order in orders]
            batch = zip(self.cases, positions, strict=True)
            parts = [(np.asarray(c.inputs)[p], np.asarray(c.targets)[p]) for c, p in batch]
            inputs, targets = (
                torch.from_numpy(np.stack([part[i] for part in parts])).to(self.device)
                for i in (0, 1)
            )
            optimiser.zero_grad()
            each: Tensor = vmap(loss)(parameters, inputs, targets)
            each.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        after = {name: p.detach().cpu().numpy() for name, p in parameters.items()}
        return [{name: a[site] for name, a in after.items()} for site in range(sites)]
