"""DP-SGD (Abadi et al. 2016, algorithm 1): Poisson batches, clipped per-record gradients, noise.

Per-record gradients come from torch.func (vmap over grad), which needs no hooks in the layers:
it was measured faster than Opacus's GradSampleModule on every convolutional network of the
catalogue, and it works with residual blocks that add in place, where the hooks fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from medfl.client.training.caseset import CaseSet
from medfl.client.training.plan import DpPlan, TrainOutcome, TrainPlan
from medfl.client.training.schedule import private_steps_in_round
from medfl.client.training.steps import (
    Fetch,
    add_correction,
    batch_source,
    make_optimiser,
    set_rate,
    trainable,
)
from medfl.common.errors import ConfigError
from medfl.common.losses import build_loss
from medfl.common.models.norms import has_batch_norm
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study

Loss = Callable[[Tensor, Tensor], Tensor]
Gradients = dict[str, Tensor]
PerRecord = Callable[[Mapping[str, Tensor], Tensor, Tensor], Gradients]

# Numbers held at once as per-record gradients: 1 GiB of float32.
MOST_NUMBERS = 2**28


def train_private(
    model: nn.Module, cases: CaseSet, study: Study, shared: Shared, plan: TrainPlan
) -> TrainOutcome:
    """One round of DP-SGD in place; every step counts, also one whose batch is empty.

    The proximal penalty and the correction are added to the noisy mean: they read weights alone,
    so they cost no privacy. `clip_gradient` is ignored, because the records are clipped already,
    and precision is full. No loss is reported: it would be an answer about the data.

    Raises:
        ConfigError: the model mixes records.
    """
    dp = plan.dp
    if dp is None:
        raise ConfigError("train_private needs plan.dp; use train for both kinds")
    parameters = trainable(model)
    gradients_of = per_record_gradients(model, build_loss(study, shared))
    fetch, normal = batch_source(cases, study, plan), noise_generator(plan)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    optimiser = make_optimiser(study.training, list(parameters.values()))
    steps, rates = private_steps_in_round(study, dp.sample_rate), 0.0
    batches = poisson_batches(len(cases), dp.sample_rate, derive(plan.seed, "sampling"))
    at_once = chunk_size(model, study.training.batch_size)
    for step, positions in enumerate(islice(batches, steps)):
        rates += set_rate(optimiser, study, plan, step, steps)
        summed = _sum_over(positions, at_once, parameters, gradients_of, fetch, dp.clip)
        mean = noisy_mean(summed, dp, dp.sample_rate * len(cases), normal)
        for name, parameter in parameters.items():
            parameter.grad = mean[name]
        _add_penalty(parameters, start, plan)
        add_correction(parameters, plan.correction)
        optimiser.step()
    return TrainOutcome(steps, None, rates / steps)


def per_record_gradients(model: nn.Module, loss_of: Loss) -> PerRecord:
    """(parameters, inputs (B, ...), targets (B, ...)) -> gradients (B, *shape) by name.

    Each record's loss is taken alone, as a batch of one; frozen parameters are the model's own.

    Raises:
        ConfigError: the model has batch norm, whose gradients do not belong to one record.
    """
    if has_batch_norm(model):
        raise ConfigError(
            "model: has batch norm, which mixes records, so it cannot train under differential "
            'privacy; build it with Shared.private, or set model.options.norm = "group"'
        )

    def loss_of_one(parameters: Mapping[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, dict(parameters), (one[None],))
        return loss_of(logits, target[None])

    return vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")


def clipped_sum(gradients: Gradients, clip: float) -> Gradients:
    """Σ over records of g · min(1, clip / ‖g‖), the norm over all parameters together.

    A record whose gradient is not a number counts as zero: it must not escape the bound.
    """
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        for gradient in gradients.values():
            gradient[bad] = 0.0
        norms = torch.where(bad, torch.zeros_like(norms), norms)
    # clip / max(norm, clip) is min(1, clip / norm) without a division by zero.
    factors = clip / norms.clamp_min(clip)
    return {name: torch.tensordot(factors, g, dims=1) for name, g in gradients.items()}


def noisy_mean(
    summed: Gradients, dp: DpPlan, expected_batch: float, normal: Callable[[Tensor], Tensor]
) -> Gradients:
    """(Σ clipped + N(0, (σ·clip)²)) / expected batch size, which no record influences."""
    sd = dp.noise_multiplier * dp.clip
    return {name: (g + sd * normal(g)) / expected_batch for name, g in summed.items()}


def noise_generator(plan: TrainPlan) -> Callable[[Tensor], Tensor]:
    """The source of the noise: standard normal numbers, shaped and placed like the argument.

    Reproducible from the plan's seed, as simulations need it. Whoever knows the seed can take
    the noise off again, so a hospital's plan must carry a seed that it drew itself and told
    nobody. This function is the only place to change for another source.
    """
    generator = torch.Generator().manual_seed(derive(plan.seed, "noise"))

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    return normal


def poisson_batches(n_cases: int, sample_rate: float, seed: int) -> Iterator[NDArray[np.int64]]:
    """Endless batches in which every case takes part with `sample_rate`, on its own; maybe none."""
    rng = np.random.default_rng(seed)
    while True:
        yield np.flatnonzero(rng.random(n_cases) < sample_rate)


def chunk_size(model: nn.Module, batch_size: int) -> int:
    """Records whose gradients are held at once; only memory and speed depend on it."""
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return max(1, min(batch_size, MOST_NUMBERS // max(numbers, 1)))


def _sum_over(
    positions: NDArray[np.int64],
    at_once: int,
    parameters: Mapping[str, nn.Parameter],
    gradients_of: PerRecord,
    fetch: Fetch,
    clip: float,
) -> Gradients:
    """Sum of clipped gradients of one Poisson batch, a chunk of records at a time."""
    values = {name: p.detach() for name, p in parameters.items()}
    summed = {name: torch.zeros_like(value) for name, value in values.items()}
    for first in range(0, len(positions), at_once):
        inputs, targets = fetch(positions[first : first + at_once])
        for name, part in clipped_sum(gradients_of(values, inputs, targets), clip).items():
            summed[name] += part
    return summed


def _add_penalty(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], plan: TrainPlan
) -> None:
    if plan.penalty is None:
        return
    penalty = plan.penalty(parameters, start)
    extra = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
    for parameter, part in zip(parameters.values(), extra, strict=True):
        if part is not None and parameter.grad is not None:
            parameter.grad += part
