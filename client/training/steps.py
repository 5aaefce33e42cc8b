"""What plain and private training share: batches on the device, learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfl.client.training.augment import augment, augmentations
from medfl.client.training.batches import batch_of
from medfl.client.training.caseset import CaseSet
from medfl.client.training.draws import Randomness
from medfl.client.training.plan import TrainPlan
from medfl.client.training.schedule import learning_rate_at
from medfl.common.study import Study

Fetch = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]


def batch_source(cases: CaseSet, study: Study, plan: TrainPlan, randomness: Randomness) -> Fetch:
    """positions -> inputs and targets on the plan's device, cut to patches and augmented.

    A record's changes depend on nothing but the record and its random numbers, so its gradient
    stays its own under differential privacy.
    """
    device, steps = torch.device(plan.device), augmentations(study)

    def fetch(positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        batch = batch_of(cases, positions, study, randomness.patches(positions))
        inputs, targets = (
            torch.from_numpy(np.ascontiguousarray(part)).to(device, non_blocking=True)
            for part in batch
        )
        if not steps:
            return inputs, targets
        return augment(steps, inputs, targets, randomness.changes(positions))

    return fetch


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def keep_frozen_statistics(model: nn.Module) -> None:
    """Layers whose parameters are all frozen stop updating their running statistics, too."""
    for layer in model.modules():
        own = list(layer.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            layer.eval()


def set_rate(
    optimiser: torch.optim.Optimizer, study: Study, plan: TrainPlan, step: int, steps: int
) -> float:
    """Set and return the learning rate of step `step` (from 0) of this round's `steps`."""
    progress = plan.round - 1 + step / steps
    rate = learning_rate_at(study.training, plan.rounds, progress, 1 / steps)
    for group in optimiser.param_groups:
        group["lr"] = rate
    return rate


def add_correction(
    parameters: Mapping[str, nn.Parameter], correction: Mapping[str, Tensor] | None
) -> None:
    """gradient += correction, by name (SCAFFOLD, Karimireddy et al. 2020, eq. 3)."""
    if correction is None:
        return
    for name, parameter in parameters.items():
        if name in correction and parameter.grad is not None:
            parameter.grad += correction[name].to(parameter.grad.device)
