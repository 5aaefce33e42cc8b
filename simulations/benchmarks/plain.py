"""The training that medfl and its rivals all do, in plain PyTorch: the benchmarks' reference.

A multilayer perceptron, one full-batch step a round: little training, so that what is measured is
the rest, and full batches, so that nobody's order of cases matters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES = ("a", "b", "c")
CASES = 64
LEARNING_RATE = 0.1

Weights = dict[str, NDArray[Any]]


def table(site: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One hospital's features (64 + 8 site, 3) and labels (0, 1): hospitals differ in size."""
    rng = np.random.default_rng(site)
    # Three decimals: the same numbers as text and as float32.
    inputs = rng.normal(size=(CASES + 8 * site, len(FEATURES))).round(3).astype(np.float32)
    return inputs, (inputs[:, 0] > inputs[:, 1]).astype(np.float32)


def trained(
    weights: Mapping[str, NDArray[Any]], inputs: NDArray[Any], labels: NDArray[Any]
) -> tuple[Weights, float]:
    """The weights after one step, and the seconds that it took; weights are named as torch does."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    widths = [len(FEATURES), *(a.shape[0] for n, a in weights.items() if n.endswith("bias"))]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, units in pairwise(widths):
        layers += [nn.Linear(width, units), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict({n: torch.from_numpy(np.asarray(a)) for n, a in weights.items()})
    started = time.perf_counter()
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    logits = model(torch.from_numpy(inputs))[:, 0]
    loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels))
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    after = {n: p.detach().numpy() for n, p in model.state_dict().items()}
    return after, time.perf_counter() - started


def loop(weights: Weights, sites: int, rounds: int) -> tuple[Weights, list[float]]:
    """What all must end with, and each round's slowest site in s: "training" in the tables."""
    seconds = []
    for _ in range(rounds):
        total = {name: np.zeros(a.shape, np.float64) for name, a in weights.items()}
        cases, slowest = 0, 0.0
        for site in range(sites):
            inputs, labels = table(site)
            own, took = trained(weights, inputs, labels)
            slowest, cases = max(slowest, took), cases + len(labels)
            for name, array in own.items():
                total[name] += len(labels) * array.astype(np.float64)
        weights = {name: (a / cases).astype(np.float32) for name, a in total.items()}
        seconds.append(slowest)
    return weights, seconds


def apart(left: Weights, right: Weights, small: float) -> float:
    """The largest difference of a parameter, relative to the largest of its array plus `small`;
    infinite where the models have other parameters."""
    if left.keys() != right.keys():
        return float("inf")
    return float(
        np.max([np.abs(a - right[n]).max() / (np.abs(a).max() + small) for n, a in left.items()])
    )


def same(left: Weights, right: Weights, tolerance: float = 1e-5, floor: float = 1e-9) -> bool:
    """Whether all parameters are equal to `tolerance`, relative to the largest of their array, or
    to `floor`."""
    return left.keys() == right.keys() and all(
        bool(np.abs(a - right[n]).max() <= tolerance * float(np.abs(a).max()) + floor)
        for n, a in left.items()
    )
