"""The mean of a run's later models (Polyak and Juditsky 1992), as `federation.keep = "average"`.

The noise of differential privacy differs from round to round, so that a mean of models has less of
it; a mean of what was released costs no privacy. Half of the rounds count: the first ones are still
far from where the others are. The mean rests beside the optimiser's state, and so a checkpoint has
it.
"""

from __future__ import annotations

from dataclasses import replace

from medfl.common import resting, tensors
from medfl.common.tensors import Tensors
from medfl.strategies.blocks import by_block
from medfl.strategies.strategy import ServerState

_SLOT = "average"


def first_averaged(rounds: int) -> int:
    """The first round (from 1) whose model counts."""
    return rounds // 2 + 1


def averaged(before: ServerState, now: ServerState, weights: Tensors, nth: int) -> ServerState:
    """`now` with the mean of the `nth` models (from 1); `before` has that of those before it.

    Raises:
        StorageError: the disk has no room for it.
    """
    floating = tensors.floats(weights)
    earlier = floating if nth == 1 else before.slots[_SLOT]
    mean = resting.zeros({name: a.shape for name, a in floating.items()}, "float32")
    by_block(lambda m, w: [m + (w - m) / nth], [earlier, floating], [mean])
    return replace(now, slots={**now.slots, _SLOT: mean})


def average_of(state: ServerState, weights: Tensors) -> Tensors:
    """The mean; counters, which have none, are those of `weights`."""
    return {**weights, **state.slots[_SLOT]}
