"""The catalogue of strategies. A new one: a function here, a line in STRATEGIES, a test."""

from __future__ import annotations

import math
from collections.abc import Callable

from medfl.common.errors import ConfigError
from medfl.common.options import checked_options
from medfl.common.study import Study
from medfl.strategies.optimisers import (
    adagrad_moment,
    adam_moment,
    adaptive,
    momentum,
    yogi_moment,
)
from medfl.strategies.strategy import Local, Strategy, Weighting


def fedavg() -> Strategy:
    """McMahan et al. 2017: the mean of the local models."""
    return Strategy()


def fedprox(*, mu: float = 0.01) -> Strategy:
    """Li et al. 2020, eq. 2: local loss + mu/2 ||w - w_global||^2."""
    return Strategy(local=Local(proximal_mu=mu))


def fedavgm(*, learning_rate: float = 1.0, momentum_beta: float = 0.9) -> Strategy:
    """Hsu et al. 2019: momentum on the server."""
    return Strategy(server_step=momentum(learning_rate, momentum_beta))


def fedadagrad(*, learning_rate: float = 0.1, tau: float = 1e-3) -> Strategy:
    """Reddi et al. 2021: Adagrad on the server."""
    return Strategy(server_step=adaptive(adagrad_moment, learning_rate, 0.0, tau))


def fedadam(
    *, learning_rate: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """Reddi et al. 2021: Adam on the server."""
    step = adaptive(adam_moment(beta_2), learning_rate, beta_1, tau, bias_beta_2=beta_2)
    return Strategy(server_step=step)


def fedyogi(
    *, learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """Reddi et al. 2021: Yogi on the server."""
    return Strategy(server_step=adaptive(yogi_moment(beta_2), learning_rate, beta_1, tau))


def scaffold() -> Strategy:
    """Karimireddy et al. 2020, Algorithm 1 with option II: control variates against drift."""
    return Strategy(local=Local(control_variates=True))


def fedbn() -> Strategy:
    """Li et al. 2021: normalisation layers stay at the hospital."""
    return Strategy(local=Local(keeps="normalisation"))


def local() -> Strategy:
    """No federation: every hospital trains alone, by the same code. The comparison's floor."""
    return Strategy(local=Local(keeps="everything"))


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "scaffold": scaffold,
    "fedbn": fedbn,
    "local": local,
}

WEIGHTINGS: dict[str, Weighting] = {
    "cases": float,
    "sqrt_cases": math.sqrt,
    "equal": lambda n_cases: 1.0,
}


def strategy_for(study: Study) -> Strategy:
    """The study's strategy with its options.

    Raises:
        ConfigError: unknown strategy or option, or a strategy that the training cannot serve.
    """
    federation = study.federation
    make = STRATEGIES.get(federation.strategy)
    if make is None:
        raise ConfigError(
            f"federation.strategy: {federation.strategy!r} is not in the catalogue; "
            f"use one of {', '.join(STRATEGIES)}"
        )
    strategy = make(**checked_options(make, federation.options, "federation.options"))
    if strategy.local.control_variates and (
        study.training.optimiser != "sgd" or study.training.momentum != 0
    ):
        raise ConfigError(
            "federation.strategy: scaffold corrects plain SGD steps; set training.optimiser to "
            '"sgd" and training.momentum to 0, or choose another strategy'
        )
    return strategy
