"""Running statistics and other buffers of a model: averaged, and in no other arithmetic.

They travel with an update and are no parameters. A server optimiser's momentum makes a variance
negative, their change has no bound that a secure sum could be given, and beside the parameters'
their length says nothing about an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from medfl.common.errors import ConfigError
from medfl.common.messages import Reply
from medfl.common.study import Study
from medfl.common.tensors import Array, Tensors, floats
from medfl.strategies.strategy import Combine, Weighting

if TYPE_CHECKING:
    from torch import nn

# torch's name for what may not fall below zero, by however little an update was rounded.
_VARIANCE = "running_var"


def buffer_names(module: nn.Module) -> frozenset[str]:
    """Names of the state that training moves without gradients, as far as it can be averaged."""
    kept = module.state_dict()
    return frozenset(
        name for name, b in module.named_buffers() if name in kept and b.is_floating_point()
    )


def refuse_unbounded(study: Study, buffers: frozenset[str]) -> None:
    """Raises ConfigError where every number that is sent must have a bound, and buffers have none.

    buffers: those that leave the hospitals.
    """
    tables = {
        "secure_aggregation": study.secure_aggregation,
        "site_privacy": study.site_privacy,
    }
    for table, found in tables.items():
        if found is not None and buffers:
            raise ConfigError(
                f"{table}: bounds what each number may change in a round, and the running "
                f"statistics of this model ({min(buffers)}) have no such bound. Set "
                'model.options.norm to "group" or "instance"'
            )


class Buffers:
    """One round's buffers: taken off the updates as they come by, averaged over the admitted ones.

    They are held in memory, a few thousand numbers a hospital.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._taken: dict[str, Reply] = {}
        self._admitted: list[Reply] = []

    def taken_off(self, updates: Iterable[Reply]) -> Iterator[Reply]:
        """The updates without their buffers."""
        for update in updates:
            if self._names:
                own = {n: a for n, a in update.delta.items() if n in self._names}
                self._taken[update.site] = replace(update, delta=own, control={})
                rest = {n: a for n, a in update.delta.items() if n not in self._names}
                update = replace(update, delta=rest)
            yield update
            del update  # else it would lie in memory until the next one is there

    def admit(self, site: str) -> None:
        """Let this site's buffers count."""
        if self._names:
            self._admitted.append(self._taken.pop(site))

    def mean(self, combine: Combine, weight: Weighting) -> Tensors:
        """The admitted changes as one; nothing where the model has no buffers."""
        return combine(iter(self._admitted), weight).delta if self._admitted else {}


def moved(weights: Tensors, delta: Tensors) -> dict[str, Array]:
    """`weights` with the buffers of `delta` moved by it; variances stay at zero or above."""
    after = dict(weights)
    for name, change in floats(delta).items():
        value = np.asarray(weights[name] + change, dtype=weights[name].dtype)
        after[name] = np.maximum(value, 0) if name.endswith(_VARIANCE) else value
    return after
