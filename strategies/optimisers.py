"""Server optimisers: the mean delta is a pseudo-gradient with the sign turned.

FedAvgM: Hsu et al. 2019. FedAdagrad, FedAdam, FedYogi: Reddi et al. 2021, Algorithm 2. The
arithmetic equals that of `flwr.serverapp.strategy` (tests compare the two).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medfl.common import resting
from medfl.common.tensors import Array, Tensors
from medfl.strategies.blocks import by_block
from medfl.strategies.strategy import ServerState, ServerStep

# v_t from (v, delta): the only line in which the three adaptive optimisers differ.
SecondMoment = Callable[[Array, Array], Array]


def momentum(learning_rate: float, beta: float) -> ServerStep:
    """SGD with momentum on the server: m = beta m + delta; weights + learning_rate m."""

    def step(
        weights: Tensors, delta: Tensors, state: ServerState
    ) -> tuple[dict[str, Array], ServerState]:
        old = state.slots.get("momentum") or _zeros(delta)
        m, moved = _zeros(delta), _room(weights, delta)

        def rule(w: Array, d: Array, before: Array) -> tuple[Array, Array]:
            after = beta * before + d
            return after, w + learning_rate * after

        by_block(rule, [weights, delta, old], [m, moved])
        return {**weights, **moved}, ServerState(state.round + 1, {"momentum": m})

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
        old_m = state.slots.get("m") or _zeros(delta)
        old_v = state.slots.get("v") or _zeros(delta)
        m, v, moved = _zeros(delta), _zeros(delta), _room(weights, delta)
        rate = learning_rate
        if bias_beta_2 is not None:
            t = state.round + 2
            rate *= float(np.sqrt(1 - bias_beta_2**t) / (1 - beta_1**t))

        def rule(w: Array, d: Array, m_before: Array, v_before: Array) -> tuple[Array, ...]:
            m_after = beta_1 * m_before + (1 - beta_1) * d
            v_after = second_moment(v_before, d)
            return m_after, v_after, w + rate * m_after / (np.sqrt(v_after) + tau)

        by_block(rule, [weights, delta, old_m, old_v], [m, v, moved])
        return {**weights, **moved}, ServerState(state.round + 1, {"m": m, "v": v})

    return step


def _zeros(delta: Tensors) -> dict[str, Array]:
    """A slot that nothing is in yet, at rest where it is large: only this step needs it."""
    return resting.zeros({name: d.shape for name, d in delta.items()}, np.float32)


def _room(weights: Tensors, delta: Tensors) -> dict[str, Array]:
    return {name: np.empty_like(a) for name, a in weights.items() if name in delta}


def adagrad_moment(v: Array, delta: Array) -> Array:
    """v + delta^2."""
    return np.asarray(v + delta**2)


def adam_moment(beta_2: float) -> SecondMoment:
    """beta_2 v + (1 - beta_2) delta^2."""
    return lambda v, delta: beta_2 * v + (1 - beta_2) * delta**2


def yogi_moment(beta_2: float) -> SecondMoment:
    """v - (1 - beta_2) delta^2 sign(v - delta^2)."""
    return lambda v, delta: v - (1 - beta_2) * delta**2 * np.sign(v - delta**2)
