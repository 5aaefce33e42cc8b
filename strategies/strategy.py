"""A strategy is a value: how updates are combined, what the server does with the result, and what
it asks of local training. Adding one is a function here or beside, and a line in the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from medfl.common.messages import Reply
from medfl.common.tensors import Array, Tensors
from medfl.strategies.blocks import by_block
from medfl.strategies.sums import Sum

Weighting = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Combined:
    """One round's updates as one: the mean delta and the mean change of control variates."""

    delta: Tensors
    control: Tensors
    n_sites: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the coordinator keeps between rounds beside the weights.

    round: rounds combined so far. slots: named groups of arrays, such as `momentum`.
    """

    round: int = 0
    slots: Mapping[str, Tensors] = field(default_factory=dict)


Combine = Callable[[Iterable[Reply], Weighting], Combined]
ServerStep = Callable[[Tensors, Tensors, ServerState], tuple[dict[str, Array], ServerState]]


@dataclass(frozen=True, slots=True)
class Local:
    """What a strategy asks of training at the hospital.

    proximal_mu: weight of the proximal term (FedProx). control_variates: correct each gradient
        (SCAFFOLD). keeps: layers that never leave the hospital.
    """

    proximal_mu: float = 0.0
    control_variates: bool = False
    keeps: Literal["nothing", "normalisation", "everything"] = "nothing"


def weighted_mean(updates: Iterable[Reply], weight: Weighting) -> Combined:
    """Mean of the deltas, weighted by `weight(n_cases)`; one running sum, whatever the number.

    McMahan et al. 2017, Algorithm 1, line 8. Control variates are averaged equally (Karimireddy et
    al. 2020, eq. 5). The sum is in float64 and in the order given: sites come in a fixed order, so
    the result does not depend on who answered first.
    """
    deltas, controls = Sum(), Sum()
    total, n_sites = 0.0, 0
    for update in updates:
        w = weight(update.n_cases)
        deltas.add(update.delta, w)
        controls.add(update.control, 1.0)
        total += w
        n_sites += 1
        del update  # else it would lie in memory until the next one is there
    return Combined(deltas.divided(total), controls.divided(n_sites), n_sites)


def take_mean(
    weights: Tensors, delta: Tensors, state: ServerState
) -> tuple[dict[str, Array], ServerState]:
    """new_weights = weights + delta (FedAvg); names without a delta stay."""
    moved = {name: np.empty_like(a) for name, a in weights.items() if name in delta}
    by_block(lambda w, d: [w + d], [weights, delta], [moved])
    return {**weights, **moved}, ServerState(state.round + 1, state.slots)


@dataclass(frozen=True, slots=True)
class Strategy:
    """How updates become the next model, and what that asks of local training.

    average: what becomes of running statistics and other buffers, which take part in nothing else.
    fewest: updates a round that `combine` can do with; a study's min_sites is at least that.
    compares: whether an update may be left out for its length among the others' (admission). Not
        under [site_privacy]: one hospital's length would then decide about another's update.
    """

    combine: Combine = weighted_mean
    server_step: ServerStep = take_mean
    average: Combine = weighted_mean
    local: Local = Local()
    fewest: int = 1
    compares: bool = True

    @property
    def needs_only_a_sum(self) -> bool:
        """Whether it can do with the sum of the updates, and so with secure aggregation."""
        return self.combine is weighted_mean and self.local.keeps != "everything"
