"""Server optimisers: the mean delta is a pseudo-gradient with the sign turned.

FedAvgM: Hsu et al. 2019. FedAdagrad, FedAdam, FedYogi: Reddi et al. 2021, Algorithm 2. The
arithmetic equals that of `flwr.serverapp.strategy` (tests compare the two).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medfl.common.tensors import Array, Tensors
from medfl.strategies.strategy import ServerState, ServerStep, take_mean

# v_t from (v, delta): the only line in which the three adaptive optimisers differ.
SecondMoment = Callable[[Array, Array], Array]


def momentum(learning_rate: float, beta: float) -> ServerStep:
    """SGD with momentum on the server: m = beta m + delta; weights + learning_rate m."""

    def step(
        weights: Tensors, delta: Tensors, state: ServerState
    ) -> tuple[dict[str, Array], ServerState]:
        old = state.slots.get("momentum", {})
        m = {name: beta * old[name] + d if name in old else d for name, d in delta.items()}
        moved, _ = take_mean(weights, {n: learning_rate * a for n, a in m.items()}, state)
        return moved, ServerState(state.round + 1, {"momentum": m})

    return step


def adaptive(
    second_moment: SecondMoment,
    learning_rate: float,
    beta_1: float,
    tau: float,
    bias_beta_2: float | None = None,
) -> ServerStep:
    """weights + learning_rate m / (sqrt(v) + tau), with m = beta_1 m + (1 - beta_1) delta.

    bias_beta_2: corrects both moments' start at zero as Flower's FedAdam does: the learning rate
        is scaled by sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)), t counted from 1.
    """

    def step(
        weights: Tensors, delta: Tensors, state: ServerState
    ) -> tuple[dict[str, Array], ServerState]:
        zeros = {name: np.zeros_like(d) for name, d in delta.items()}
        old_m, old_v = state.slots.get("m", zeros), state.slots.get("v", zeros)
        m = {n: beta_1 * old_m[n] + (1 - beta_1) * d for n, d in delta.items()}
        v = {n: second_moment(old_v[n], d) for n, d in delta.items()}
        rate = learning_rate
        if bias_beta_2 is not None:
            t = state.round + 2
            rate *= float(np.sqrt(1 - bias_beta_2**t) / (1 - beta_1**t))
        change = {n: rate * m[n] / (np.sqrt(v[n]) + tau) for n in delta}
        moved, _ = take_mean(weights, change, state)
        return moved, ServerState(state.round + 1, {"m": m, "v": v})

    return step


def adagrad_moment(v: Array, delta: Array) -> Array:
    """v + delta^2."""
    return np.asarray(v + delta**2)


def adam_moment(beta_2: float) -> SecondMoment:
    """beta_2 v + (1 - beta_2) delta^2."""
    return lambda v, delta: beta_2 * v + (1 - beta_2) * delta**2


def yogi_moment(beta_2: float) -> SecondMoment:
    """v - (1 - beta_2) delta^2 sign(v - delta^2)."""
    return lambda v, delta: v - (1 - beta_2) * delta**2 * np.sign(v - delta**2)
