"""Local training of one round: from the received weights to the hospital's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medfl.client.training.batches import shuffled_batches
from medfl.client.training.caseset import CaseSet
from medfl.client.training.draws import FromSeed
from medfl.client.training.optimisers import make_optimiser
from medfl.client.training.plan import TrainOutcome, TrainPlan
from medfl.client.training.private import train_private
from medfl.client.training.schedule import steps_in_round
from medfl.client.training.steps import (
    add_correction,
    batch_source,
    keep_frozen_statistics,
    set_rate,
    trainable,
)
from medfl.common.errors import DataError
from medfl.common.losses import build_loss
from medfl.common.models.norms import has_batch_norm
from medfl.common.models.weights import place
from medfl.common.seeds import derive
from medfl.common.statistics import Shared
from medfl.common.study import Study, Training

__all__ = ["steps_in_round", "train"]


def train(
    model: nn.Module, cases: CaseSet, study: Study, shared: Shared, plan: TrainPlan
) -> TrainOutcome:
    """Train `model` in place for one round; with `plan.dp` under differential privacy.

    Everything random comes from `plan.seed`, under differential privacy from `plan.dp.key`: the
    same weights, cases and plan give the same bits in any process with the same number of threads.
    The optimiser starts afresh every round.

    Raises:
        DataError: no cases, or the loss stopped being a number. Under differential privacy no
            cases are no error: whether there is one must not show, so the steps are noise alone.
        ConfigError: `plan.dp` for a model that mixes records; an unknown augmentation.
    """
    if len(cases) == 0 and plan.dp is None:
        raise DataError("There are no training cases. Check the data and the study's split.")
    place(model, plan.device).train()
    keep_frozen_statistics(model)
    with _own_randomness(plan):
        how = _train_plain if plan.dp is None else train_private
        return how(model, cases, study, shared, plan)


def _train_plain(
    model: nn.Module, cases: CaseSet, study: Study, shared: Shared, plan: TrainPlan
) -> TrainOutcome:
    training, device = study.training, torch.device(plan.device)
    loss_of, fetch = (
        build_loss(study, shared),
        batch_source(cases, study, plan, FromSeed(plan.seed)),
    )
    parameters = trainable(model)
    start = {n: p.detach().clone() for n, p in parameters.items()} if plan.penalty else {}
    optimiser = make_optimiser(training, list(parameters.values()))
    precision, scaler = _precision(training, device)
    steps = steps_in_round(study, len(cases))
    total, seen, rates = torch.zeros((), device=device), 0, 0.0
    for step, positions in enumerate(islice(_order(model, cases, training, plan), steps)):
        rates += set_rate(optimiser, study, plan, step, steps)
        inputs, targets = fetch(positions)
        with precision:
            loss = loss_of(model(inputs), targets)
        total += loss.detach() * len(positions)
        seen += len(positions)
        if plan.penalty is not None:
            loss = loss + plan.penalty(parameters, start)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimiser)
        if training.clip_gradient is not None:
            nn.utils.clip_grad_norm_(parameters.values(), training.clip_gradient)
        add_correction(parameters, plan.correction)
        scaler.step(optimiser)
        scaler.update()
    return TrainOutcome(steps, _finite(float(total) / seen, plan), rates / steps)


def _order(
    model: nn.Module, cases: CaseSet, training: Training, plan: TrainPlan
) -> Iterator[NDArray[np.int64]]:
    # Batch norm cannot learn from one record.
    at_least = 2 if has_batch_norm(model) else 1
    return shuffled_batches(
        len(cases), training.batch_size, derive(plan.seed, "order"), at_least=at_least
    )


def _precision(
    training: Training, device: torch.device
) -> tuple[AbstractContextManager[object], torch.amp.GradScaler]:
    """Autocast and a loss scaler; both do nothing without an accelerator."""
    if device.type != "cuda" or training.mixed_precision == "off":
        return nullcontext(), torch.amp.GradScaler("cpu", enabled=False)
    bf16 = torch.cuda.is_bf16_supported()
    kind = torch.bfloat16 if bf16 else torch.float16
    # bfloat16 has float32's range, so only float16 needs the loss scaled.
    return torch.autocast("cuda", dtype=kind), torch.amp.GradScaler("cuda", enabled=not bf16)


@contextmanager
def _own_randomness(plan: TrainPlan) -> Iterator[None]:
    """Dropout draws from the plan's seed; the process's own random state is left as it was."""
    device = torch.device(plan.device)
    accelerators = [device] if device.type == "cuda" else []
    seed = derive(plan.seed, "dropout")
    with torch.random.fork_rng(devices=accelerators):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _finite(loss: float, plan: TrainPlan) -> float:
    if not math.isfinite(loss):
        raise DataError(
            f"The training loss of round {plan.round} is not a number. Lower "
            "training.learning_rate, or set training.clip_gradient to 1."
        )
    return loss
