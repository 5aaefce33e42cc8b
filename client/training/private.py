"""DP-SGD (Abadi et al. 2016, algorithm 1): Poisson batches of patients, clipped once each, noise.

What makes the clipped sums is an engine (`medfl.client.training.engines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from medfl.client.training.caseset import CaseSet
from medfl.client.training.clipping import Clipping
from medfl.client.training.draws import OfEach
from medfl.client.training.dropout import Dropouts
from medfl.client.training.engines.choice import engine_for
from medfl.client.training.engines.engine import Bound, Engine
from medfl.client.training.engines.materialised import clipped_sum
from medfl.client.training.optimisers import make_optimiser
from medfl.client.training.plan import DpPlan, TrainOutcome, TrainPlan
from medfl.client.training.schedule import private_steps_in_round
from medfl.client.training.steps import (
    Fetch,
    add_correction,
    batch_source,
    set_rate,
    trainable,
)
from medfl.client.training.units import (
    Gradients,
    Positions,
    groups,
    poisson_batches,
    unit_names,
    units_of,
)
from medfl.common.errors import ConfigError
from medfl.common.losses import build_loss
from medfl.common.models.norms import has_batch_norm
from medfl.common.noise import AT_ONCE, Keystream
from medfl.common.statistics import Shared
from medfl.common.study import Study

# Numbers held at once as per-record gradients: 1 GiB of float32.
MOST_NUMBERS = 2**28


def train_private(
    model: nn.Module, cases: CaseSet, study: Study, shared: Shared, plan: TrainPlan
) -> TrainOutcome:
    """One round of DP-SGD in place; every step counts, also one whose batch is empty.

    The proximal penalty and the correction are added to the noisy mean: they read weights alone,
    so they cost no privacy. `clip_gradient` is ignored, because the units are clipped already,
    and precision is full. No loss is reported: it would be an answer about the data.

    Raises:
        ConfigError: the model mixes records, or draws random numbers that are not its records' own.
    """
    dp = plan.dp
    if dp is None:
        raise ConfigError("train_private needs plan.dp; use train for both kinds")
    if has_batch_norm(model):
        raise ConfigError(
            "model: has batch norm, which mixes records, so it cannot train under differential "
            'privacy; build it with Shared.private, or set model.options.norm = "group"'
        )
    each = OfEach(dp.key, cases.keys)
    dropouts = Dropouts(each)
    engine = engine_for(model, build_loss(study, shared), dropouts)
    with dropouts.replaced(model):
        return _steps(engine, trainable(model), cases, study, plan, dp, each)


def _steps(
    engine: Engine,
    parameters: Mapping[str, nn.Parameter],
    cases: CaseSet,
    study: Study,
    plan: TrainPlan,
    dp: DpPlan,
    each: OfEach,
) -> TrainOutcome:
    fetch, normal = _fetch(cases, study, plan, each), noise_generator(dp)
    units = units_of(cases, dp.unit)
    expected_batch = dp.sample_rate * (dp.n_declared or len(units))
    start = {n: p.detach().clone() for n, p in parameters.items()}
    optimiser = make_optimiser(study.training, list(parameters.values()))
    steps, rates = private_steps_in_round(study, dp.sample_rate), 0.0
    clipping = Clipping(dp, expected_batch)
    batches = poisson_batches(unit_names(cases, units, dp.unit), dp.sample_rate, dp.key)
    at_once = chunk_size(parameters.values(), study.training.batch_size)
    for step, drawn in enumerate(islice(batches, steps)):
        each.step = step
        rates += set_rate(optimiser, study, plan, step, steps)
        batch = [units[int(i)] for i in drawn]
        bound = Bound(clipping.value)
        summed = sum_of_units(batch, at_once, parameters, engine, fetch, bound)
        mean = noisy_mean(summed, clipping.sd, expected_batch, normal)
        clipping.after(bound, len(batch))
        for name, parameter in parameters.items():
            parameter.grad = mean[name]
        _add_penalty(parameters, start, plan)
        add_correction(parameters, plan.correction)
        optimiser.step()
    moved = clipping.value if dp.quantile is not None else None
    return TrainOutcome(steps, None, rates / steps, moved)


def noisy_mean(
    summed: Gradients, sd: float, expected_batch: float, normal: Callable[[Tensor], Tensor]
) -> Gradients:
    """(Σ clipped + N(0, sd²)) / expected batch size, which no unit influences.

    Added in float64 and rounded afterwards: the sum's last bits say nothing of the gradient.
    """
    flat = torch.cat([g.reshape(-1) for g in summed.values()])
    # As many at a time as are made at once: they are still in the cache when they are added.
    for piece in torch.split(flat, AT_ONCE):
        piece.copy_(normal(piece).double().mul_(sd).add_(piece).div_(expected_batch))
    parts = torch.split(flat, [g.numel() for g in summed.values()])
    shaped = zip(summed.items(), parts, strict=True)
    return {name: part.reshape(g.shape).to(g.dtype) for (name, g), part in shaped}


def noise_generator(dp: DpPlan) -> Callable[[Tensor], Tensor]:
    """The only source of noise: standard normal float64, shaped and placed like the argument."""
    stream = Keystream(dp.key, "noise")

    def normal(like: Tensor) -> Tensor:
        numbers = torch.from_numpy(stream.normals(like.numel()))
        return numbers.reshape(like.shape).to(like.device)

    return normal


def _fetch(cases: CaseSet, study: Study, plan: TrainPlan, each: OfEach) -> Fetch:
    """The records of a batch, of which `each` is told before the model sees them."""
    source = batch_source(cases, study, plan, each)

    def fetch(positions: Positions) -> tuple[Tensor, Tensor]:
        each.batch = positions
        return source(positions)

    return fetch


def chunk_size(parameters: Iterable[Tensor], batch_size: int) -> int:
    """Records whose gradients are held at once; only memory and speed depend on it.

    parameters: those that are trained.
    """
    numbers = sum(p.numel() for p in parameters)
    return max(1, min(batch_size, MOST_NUMBERS // max(numbers, 1)))


def sum_of_units(
    batch: Sequence[Positions],
    at_once: int,
    parameters: Mapping[str, Tensor],
    engine: Engine,
    fetch: Fetch,
    bound: Bound,
) -> Gradients:
    """Sum of the units' clipped contributions to one Poisson batch, some records at a time."""
    summed = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for group in groups(batch, at_once):
        if len(group) == 1 and len(group[0]) > at_once:
            part = clipped_sum(_mean_in_parts(group[0], at_once, engine, fetch), bound)
        else:
            sizes = [len(unit) for unit in group]
            part = engine.clipped_sum(*fetch(np.concatenate(group)), sizes, bound)
        for name, gradient in part.items():
            summed[name] += gradient
    return summed


def _mean_in_parts(unit: Positions, at_once: int, engine: Engine, fetch: Fetch) -> Gradients:
    """(1, *shape): the mean gradient of a unit with more records than are held at once."""
    total: Gradients = {}
    for first in range(0, len(unit), at_once):
        part = engine.total(*fetch(unit[first : first + at_once]))
        total = {n: g + total[n] if n in total else g for n, g in part.items()}
    return {name: gradient[None] / len(unit) for name, gradient in total.items()}


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
