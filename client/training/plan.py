"""What one hospital is told to do in one round, and what it says about it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from medfl.common.noise import fresh_key

if TYPE_CHECKING:
    from torch import Tensor

    Penalty = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class DpPlan:
    """Differential privacy of one round's steps.

    noise_multiplier: sd of the noise over `clip`, where all of it is for the gradients.
    sample_rate: probability that a unit takes part in a step.
    clip: bound on the L2 norm of one unit's contribution; with a quantile, of the first step.
    quantile: the share of units that the bound should leave as they are; None: it stays.
    unit: whom this protects: a patient with all records, or each record alone.
    n_declared: units that the hospital says it has, for the expected batch; None: as many as
        there are, which then counts as known to everybody.
    key: 32 bytes that decide everything random: noise, sampling, patches, augmentation, dropout.
        Whoever knows them sees through it, so they are drawn afresh unless a simulation, which is
        to be repeated, hands them in.
    """

    noise_multiplier: float
    sample_rate: float
    clip: float
    quantile: float | None = None
    unit: Literal["patient", "record"] = "patient"
    n_declared: int | None = None
    key: bytes = field(default_factory=fresh_key, repr=False)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """One round at one hospital.

    round: from 1 to rounds. seed: decides shuffling, patches, augmentation and dropout
        without differential privacy, and nothing under it.
    penalty: (local, global) parameters by name -> scalar added to the loss (FedProx).
    correction: by parameter name, added to every gradient (SCAFFOLD: c - c_i).
    """

    round: int
    rounds: int
    seed: int
    device: str = "cpu"
    dp: DpPlan | None = None
    penalty: Penalty | None = None
    correction: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """steps: optimiser steps done. loss: mean over the records seen, None under differential
    privacy. learning_rate: mean over the steps, so that steps · learning_rate is their sum.
    clip: the bound that the next step would have had, where it follows a quantile."""

    steps: int
    loss: float | None
    learning_rate: float
    clip: float | None = None
